"""What a model function must not do, and the messages that say so, each with the user's line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


from torch import Tensor

from funcmodels.errors import TraceError
from funcmodels.source import users_line

_RANDOM = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal",
    "bernoulli", "multinomial", "poisson", "dropout", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout", "rrelu", "gumbel_softmax", "scaled_dot_product_attention_dropout",
}  # fmt: skip
_READS_VALUE = {
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__",
    "nonzero", "unique", "masked_select", "equal", "allclose", "is_nonzero",
}  # fmt: skip
_IN_PLACE_DUNDER = {"__setitem__", "__set__", "__delitem__"}
# Names that end in an underscore but change no values.
_NOT_IN_PLACE = {"requires_grad_", "retain_grad_"}


def impure(func: Any, args: tuple, kwargs: dict) -> None:
    """Refuse an operation that writes into a tensor, draws random numbers or reads a value."""
    name = getattr(func, "__name__", "")
    if name in _RANDOM and not _switched_off(name, args, kwargs):
        raise TraceError(
            f"torch.{name} draws random numbers",
            need="a pure function: the same arguments give the same result",
            from_=users_line(),
            fix="take the noise as an argument, or leave it out: serving never drops out",
        )
    if name in _READS_VALUE:
        raise branch_on_value(None, name)
    writes = name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE
    if writes or name in _IN_PLACE_DUNDER or kwargs.get("out") is not None:
        shown = "out=" if kwargs.get("out") is not None else name
        raise TraceError(
            f"{shown} writes into a tensor",
            got="a parameter, an input or a value that others may still use is changed in place",
            need="a pure function: it may only make new tensors",
            from_=users_line(),
            fix=_out_of_place(name),
        )


def _switched_off(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a dropout is told to do nothing."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return "dropout" in name and (p == 0 or not training)


def _out_of_place(name: str) -> str:
    if name == "__setitem__":
        return "torch.where(mask, new, x), or torch.cat of the parts"
    if name == "__set__":
        return "make a new tensor instead of setting an attribute"
    return f"use {name.rstrip('_')} and bind the result: x = x.{name.rstrip('_')}(...)"


def mutated_tree(fn: Callable[..., Any], before: list[Any], after: list[Any]) -> None:
    """Refuse a function that puts other values into the dicts and lists it was given."""
    if len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True)):
        return
    code = getattr(fn, "__code__", None)
    raise TraceError(
        f"{fn.__name__} changes the parameters it was given",
        got="a dict or list among its arguments holds other values after the call",
        need="a pure function: read from p, never assign to p[...]",
        from_=f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}" if code else None,
        fix="bind the new value to a local name: q = p['q'] * scale",
    )


def branch_on_value(error: Exception | None, name: str = "if, while or bool()") -> TraceError:
    return TraceError(
        f"{name} needs the value of a tensor, which is not known when a model is compiled",
        need="Python control flow on static values only: config fields and shapes",
        from_=users_line(),
        fix="torch.where(condition, a, b), or decide by a config field",
    )


def branch_on_size(guard: Any, symbols: dict[str, str]) -> TraceError:
    text = str(guard)
    for symbol, name in symbols.items():
        text = text.replace(symbol, name)
    return TraceError(
        "Python branches on the number of tokens",
        got=f"the branch taken assumes {text}",
        need="code that does the same for any number of tokens: it would be frozen as traced",
        from_=users_line(),
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
    return TraceError(
        f"an argument of the block {fn.__name__} cannot be compared",
        got=f"{type(value).__name__}, which is not hashable",
        need="tensors, pytrees of tensors, and hashable static values",
        from_=users_line(),
        fix="a frozen dataclass, a tuple or a plain number",
    )


def wrong_result(forward: Callable[..., Any], logits: Any, tokens: Tensor) -> None:
    """Refuse a forward that does not return one tensor of shape (*tokens, vocab)."""
    shape = tuple(map(str, logits.shape)) if isinstance(logits, Tensor) else None
    leading = tuple(map(str, tokens.shape))
    if shape is not None and shape[:-1] == leading and len(shape) == len(leading) + 1:
        if logits.dtype.is_floating_point:
            return
    got = type(logits).__name__
    if isinstance(logits, Tensor):
        sizes = ", ".join("num_tokens" if n in leading else n for n in shape or ())
        got = f"({sizes}) of {str(logits.dtype).removeprefix('torch.')}"
    code = getattr(forward, "__code__", None)
    raise TraceError(
        f"{forward.__name__} does not return logits",
        got=got,
        need="one floating-point tensor of shape (num_tokens, vocab) for tokens (num_tokens,)",
        from_=f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}" if code else None,
        fix="return ops.unembed(x, params['head']), with x of shape (*batch, seq, hidden)",
    )


