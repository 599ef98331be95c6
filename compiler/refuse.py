"""What a model function must not do, and the messages that say so, each with the user's line."""

from __future__ import annotations

import functools
import inspect
import random
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from compiler.ir import MODEL_DTYPE, target_name
from compiler.normalize import DROPOUT
from funcmodels.errors import FuncModelsError, TraceError
from funcmodels.source import SourceLine, is_users, users_line

_RANDOM = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal",
    "bernoulli", "binomial", "multinomial", "poisson", "rrelu", "gumbel_softmax", "native_dropout",
    "_standard_gamma", "_sample_dirichlet",
}  # fmt: skip
# Where attention's share that is dropped stands among the arguments.
_DROPOUT_AT = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}
_READS_VALUE = {
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__",
    "nonzero", "unique", "masked_select", "equal", "allclose", "is_nonzero",
}  # fmt: skip
# Memory as it happens to be: the result depends on what ran before.
_UNINITIALISED = {
    "empty",
    "empty_like",
    "empty_strided",
    "empty_permuted",
    "new_empty",
    "new_empty_strided",
}
_IN_PLACE_DUNDER = {
    "__setitem__", "__set__", "__delitem__", "__iand__", "__ior__", "__ixor__", "__ilshift__",
    "__irshift__", "__ipow__", "__imod__", "__ifloordiv__", "__imatmul__", "__iadd__", "__isub__",
    "__imul__", "__itruediv__", "__idiv__",
}  # fmt: skip
# Names that end in an underscore but change no values.
_NOT_IN_PLACE = {"requires_grad_", "retain_grad_"}


def _function(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, out of partials and wrappers."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.unwrap(fn)


def name_of(fn: Callable[..., Any]) -> str:
    """What a function is called, also where arguments are bound to it."""
    return getattr(_function(fn), "__name__", type(fn).__name__)


def defined(fn: Callable[..., Any]) -> SourceLine | None:
    """The line that a function is defined on."""
    code = getattr(_function(fn), "__code__", None)
    return code and SourceLine(code.co_filename, code.co_firstlineno, code.co_name)


def impure(func: Any, args: tuple, kwargs: dict) -> None:
    """Refuse an operation that writes into a tensor, draws random numbers or reads a value."""
    name = getattr(func, "__name__", "")
    if name in _RANDOM or _drops(name, args, kwargs):
        raise TraceError(
            f"torch.{name} draws random numbers",
            need="a pure function: the same arguments give the same result",
            from_=users_line(),
            fix="take the noise as an argument, or leave it out: serving never drops out",
        )
    if name in _UNINITIALISED:
        raise TraceError(
            f"torch.{name} gives whatever the memory held",
            need="a pure function: the same arguments give the same result",
            from_=users_line(),
            fix=f"torch.{name.replace('new_', '').replace('empty', 'zeros')}",
        )
    if name in _READS_VALUE:
        raise branch_on_value(None, name)
    if isinstance(func, HigherOrderOperator):
        raise given_a_function(name, users_line())
    writes = name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE
    flags = [f for f in ("out", "inplace") if kwargs.get(f) is not None and kwargs[f] is not False]
    if writes or name in _IN_PLACE_DUNDER or flags:
        shown = f"{flags[0]}=" if flags else name
        raise TraceError(
            f"{shown} writes into a tensor",
            got="a parameter, an input or a value that others may still use is changed in place",
            need="a pure function: it may only make new tensors",
            from_=users_line(),
            fix=f"leave {flags[0]}= out, and bind the result" if flags else _out_of_place(name),
        )


def given_a_function(name: str, where: SourceLine | None) -> TraceError:
    return TraceError(
        f"{name} is given a function, and nothing of that would be recorded",
        need="functions that the model calls itself",
        from_=where,
        fix="over layers, a Python loop: a block is recorded once; over tokens, ops.recurrent or "
        "ops.attention; for a choice, torch.where",
    )


def say_where(error: Exception) -> None:
    """Let what went wrong in a user's function name the line, where it does not yet."""
    where = raised_at(error)
    if isinstance(error, FuncModelsError):
        error.say_where(where)
    elif where is not None and not hasattr(error, "__notes__"):
        error.add_note(f"  from: {where}, while the model was recorded")


def raised_at(error: Exception) -> SourceLine | None:
    """The innermost line of the user's that an error came through."""
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    lines = [
        SourceLine(code.co_filename, line, code.co_name)
        for code, line in frames
        if is_users(code.co_filename)
    ]
    return lines[-1] if lines else None


def _drops(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether elements are dropped, by a dropout or within attention."""

    def given(i: int, argument: str, default: Any) -> Any:
        return kwargs.get(argument, args[i] if len(args) > i else default)

    if (at := _DROPOUT_AT.get(name)) is not None:
        return bool(given(at, "dropout_p", 0.0)) and given(at + 3, "training", True)
    if not DROPOUT.fullmatch(name):
        return False
    training = kwargs.get("train", given(2, "training", True))
    return bool(given(1, "p", 0.5)) and training


def _out_of_place(name: str) -> str:
    if name == "__setitem__":
        return "torch.where(mask, new, x), or torch.cat of the parts"
    if name == "__set__":
        return "make a new tensor instead of setting an attribute"
    return f"use {name.rstrip('_')} and bind the result: x = x.{name.rstrip('_')}(...)"


def random_states() -> tuple[object, ...]:
    """Where the random number generators of Python and NumPy are."""
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state(legacy=False)["state"]
    return random.getstate(), None if drawn is None else (drawn["pos"], drawn["key"].tobytes())


def drew_numbers(fn: Callable[..., Any], before: tuple[object, ...]) -> None:
    """Refuse a function that draws from Python's or NumPy's generator: it would be frozen."""
    names = ("random", "numpy.random")
    found = [n for n, a, b in zip(names, before, random_states(), strict=True) if a != b]
    if found:
        raise TraceError(
            f"{name_of(fn)} draws random numbers from {found[0]}",
            got="a number that is another one each time it is called",
            need="a pure function: the same arguments give the same result",
            from_=defined(fn),
            fix="a config field, or a parameter that is not trained",
        )


def mutated_tree(fn: Callable[..., Any], before: list[Any], after: list[Any]) -> None:
    """Refuse a function that puts other values into the dicts and lists it was given."""
    if len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True)):
        return
    raise TraceError(
        f"{name_of(fn)} changes the parameters it was given",
        got="a dict or list among its arguments holds other values after the call",
        need="a pure function: read from p, never assign to p[...]",
        from_=defined(fn),
        fix="bind the new value to a local name: q = p['q'] * scale",
    )


def branch_on_value(error: Exception | None, name: str = "if, while or bool()") -> TraceError:
    return TraceError(
        f"{name} needs the value of a tensor, which is not known when a model is compiled",
        need="Python control flow on static values only: config fields and shapes",
        from_=users_line(),
        fix="torch.where(condition, a, b), or decide by a config field; for i in range(n), and not "
        "over a tensor",
    )


def two_dtypes(func: Any, args: Any, kwargs: Any, error: RuntimeError) -> None:
    """Say which dtypes torch would not take together: its own words name the model's stand-in."""
    found = [t.dtype for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    dtypes = list(dict.fromkeys(dtype for dtype in found if dtype.is_floating_point))
    if len(dtypes) < 2 or not re.search("dtype|scalar type", str(error)):
        return
    raise TraceError(
        f"{getattr(func, '__name__', func)} of tensors of two dtypes",
        got=" and ".join("the model's dtype" if d == MODEL_DTYPE else str(d) for d in dtypes),
        need="one dtype, also where weights are loaded in bfloat16; a recurrence's state keeps the "
        "one that it is declared with",
        from_=users_line(),
        fix="x.float() of what has the model's dtype, as the x of a recurrence that is made of "
        "activations",
    ) from error


def fixes_size(func: Any) -> TraceError:
    return TraceError(
        f"{target_name(func)} is only recorded for one number of tokens",
        got="it takes the tokens apart, or torch cannot infer its shape for any number of them",
        need="operations on whole (num_tokens, ...) tensors",
        from_=users_line(),
        fix="index with `...`, take no sizes from the number of tokens, and call it outside a vmap",
    )


def not_of_tokens(step: Callable[..., Any], found: Any) -> TraceError:
    return TraceError(
        f"the recurrence {name_of(step)} has an x that is not of the model's tokens",
        got=str(found),
        need="(*batch, seq, ...), as tokens have them",
        from_=users_line(),
        fix="what all tokens share goes to params=; reshape below the dims of the tokens alone",
    )


def recurrence_in_transform(step: Callable[..., Any]) -> TraceError:
    return TraceError(
        f"the recurrence {name_of(step)} is inside a transform of torch.func",
        need="ops.recurrent on the model's own tensors",
        from_=users_line(),
        fix="give the step a further dim, as heads, in place of the vmap",
    )


def branch_on_dtype(where: SourceLine) -> TraceError:
    return TraceError(
        "what is computed depends on the model's dtype",
        got="a value of Python that was made from x.dtype: a branch, or torch.finfo",
        need="code that does the same in any dtype: weights are loaded in one or another",
        from_=where,
        fix="cast to a dtype that you name, x.float(), and back by .to(x.dtype)",
    )


def branch_on_device(where: SourceLine) -> TraceError:
    return TraceError(
        "what is computed depends on the device",
        got="a value of Python that was made from x.device or x.is_cuda: a branch",
        need="code that does the same on any device: models are compiled on none",
        from_=where,
        fix="the same operations everywhere; the ops of funcmodels choose kernels by device",
    )


def not_of_dtype(func: Any, error: Exception) -> TraceError:
    return TraceError(
        f"{target_name(func)} is not for half precision, which a model may be loaded in",
        got=str(error).partition("\n")[0],
        need="an operation that torch has for any floating dtype, or a cast before it",
        from_=users_line(),
        fix="x.float() before it, and .to(x.dtype) after",
    )


def of_no_dtype(func: Any, x: Any, out: Any) -> None:
    """Refuse what depends on how wide the model's dtype is, or is not there for bfloat16."""
    name = target_name(func)
    kinds = [leaf.dtype for leaf in pytree.tree_leaves((x, out)) if isinstance(leaf, Tensor)]
    if torch.complex32 in kinds:
        raise TraceError(
            f"{name} makes complex numbers of the model's dtype, and bfloat16 has none",
            need="complex numbers of a dtype that you name",
            from_=users_line(),
            fix="x.float() before it, and .to(x.dtype) after torch.view_as_real",
        )
    if name == "Tensor.view" and MODEL_DTYPE in kinds and len(set(kinds)) > 1:
        raise TraceError(
            "the bits of the model's dtype are seen as another's: there may be 16 or 32 of them",
            need="bits of a dtype that you name",
            from_=users_line(),
            fix="x.float().view(torch.int32)",
        )


def without_shapes(func: Any, error: Exception) -> TraceError:
    return TraceError(
        f"{target_name(func)} cannot be recorded: torch does not say what shape it gives",
        got=f"{error}, which has no form for tensors without values",
        need="operations that torch.compile can follow too",
        from_=users_line(),
        fix="write it with other operations of torch",
    )


def not_below(func: Any, error: Exception) -> TraceError:
    return TraceError(
        f"{target_name(func)} cannot be recorded inside a transform of torch.func",
        got=str(error).partition("\n")[0],
        need="an operation that torch can follow for any number of tokens",
        from_=users_line(),
        fix="call it outside the vmap, on all at once: most operations take a dim",
    )


def size_as_value(value: Any, symbols: dict[str, str]) -> TraceError:
    text = str(value)
    for symbol, name in symbols.items():
        text = text.replace(symbol, name)
    return TraceError(
        "a value is computed from the number of tokens",
        got=text,
        need="sizes of tokens in shapes only",
        from_=users_line(),
        fix="a config field, or a tensor computed from positions",
    )


def context(what: str, fix: str) -> TraceError:
    return TraceError(
        f"{what} is active around an operation",
        got="operations are recorded without the `with` around them",
        need="a function that says itself what it computes",
        from_=users_line(),
        fix=fix,
    )


def transform(name: str) -> TraceError:
    return TraceError(
        f"torch.func.{name} inside a model cannot be recorded",
        got="a function of two halves, of which the second is called later",
        need="torch.func.vmap, grad, grad_and_value, jvp or jacfwd",
        from_=users_line(),
        fix="torch.func.grad of the inner product with the cotangents, or jvp",
    )


def written_below(name: str) -> TraceError:
    return TraceError(
        f"torch writes into a tensor by {name} inside a transform",
        need="operations that make new tensors",
        from_=users_line(),
        fix="write this part of the function with other operations, or without the transform",
    )


def branch_on_size(guard: Any, symbols: dict[str, str], where: SourceLine) -> TraceError:
    text = str(guard)
    for symbol, name in symbols.items():
        text = text.replace(symbol, name)
    return TraceError(
        "Python branches on the number of tokens",
        got=f"the branch taken assumes {text}",
        need="code that does the same for any number of tokens: it would be frozen as traced",
        from_=where,
        fix="torch.where on a tensor condition, or decide by a config field",
    )


def closure(what: str, user: Any) -> TraceError:
    return TraceError(
        f"a block uses {what} without being given it",
        got=f"used by {getattr(user, '__name__', user)}",
        need="a block that is a function of its arguments alone",
        from_=users_line(),
        fix="pass it to the block as an argument",
    )


def global_tensor(value: Tensor, user: Any) -> TraceError:
    return TraceError(
        "a tensor from outside the function is read",
        got=f"shape {tuple(value.shape)}, used by {getattr(user, '__name__', user)}",
        need="every tensor to be a parameter, an input, or computed from them",
        from_=users_line(),
        fix="declare it as a parameter with P(...), or compute it inside forward",
    )


def unhashable(value: Any, fn: Callable[..., Any]) -> TraceError:
    if isinstance(value, torch.SymInt):
        return TraceError(
            f"the block {name_of(fn)} is given the number of tokens",
            need="tensors, pytrees of tensors, and values known when compiling",
            from_=users_line(),
            fix="take it inside the block from a tensor's shape: x.shape[0]",
        )
    return TraceError(
        f"an argument of the block {name_of(fn)} cannot be compared",
        got=f"{type(value).__name__}, which is not hashable",
        need="tensors, pytrees of tensors, and hashable static values",
        from_=users_line(),
        fix="a frozen dataclass, a tuple or a plain number",
    )


def wrong_result(forward: Callable[..., Any], logits: Any, tokens: Tensor) -> None:
    """Refuse a forward that does not return one tensor of shape (*tokens, vocab)."""
    shape = tuple(map(str, logits.shape)) if isinstance(logits, Tensor) else None
    leading = tuple(map(str, tokens.shape))
    fits = shape is not None and shape[:-1] == leading and len(shape) == len(leading) + 1
    if fits and logits.dtype.is_floating_point:
        return
    got = type(logits).__name__
    if isinstance(logits, Tensor):
        sizes = ", ".join("num_tokens" if n in leading else n for n in shape or ())
        got = f"({sizes}) of {str(logits.dtype).removeprefix('torch.')}"
    raise TraceError(
        f"{name_of(forward)} does not return logits",
        got=got,
        need="one floating-point tensor of shape (num_tokens, vocab) for tokens (num_tokens,)",
        from_=defined(forward),
        fix="return ops.unembed(x, params['head']), with x of shape (*batch, seq, hidden)",
    )
