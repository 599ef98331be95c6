"""Plain torch operations as source text: infix where Python has it, methods where usual."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from compiler import collectives
from compiler.emit.scope import Scope
from compiler.ir import MODEL_DTYPE, is_factory, target_name, tensor_type
from compiler.rules import (
    max_over_ranks,
    more_than_zero,
    rms_norm_over_ranks,
    share_of_mean,
    widened,
)
from funcmodels import ops
from funcmodels.errors import LoweringError

_INFIX = {
    torch.add: "+",
    torch.sub: "-",
    torch.mul: "*",
    torch.div: "/",
    torch.matmul: "@",
    torch.pow: "**",
    torch.floor_divide: "//",
    torch.remainder: "%",
    torch.eq: "==",
    torch.ne: "!=",
    torch.lt: "<",
    torch.le: "<=",
    torch.gt: ">",
    torch.ge: ">=",
}
_METHODS = (
    torch.reshape, torch.transpose, torch.permute, torch.movedim, torch.unsqueeze, torch.squeeze,
    torch.split, torch.chunk, torch.unbind, torch.clone, torch.sum, torch.mean, torch.flatten,
    torch.unflatten,
)  # fmt: skip

Emitter = Callable[[Scope, fx.Node], str]
_SPECIAL: dict[Any, Emitter] = {}


def expression(scope: Scope, node: fx.Node) -> str:
    """The source of a node that is no layer."""
    if node.target in _SPECIAL:
        return _SPECIAL[node.target](scope, node)
    if node.target in _INFIX and len(node.args) == 2 and not node.kwargs:
        left, right = (scope.value(a) for a in node.args)
        if node.target is torch.pow and left.startswith("-"):  # -1 ** x is -(1 ** x)
            left = f"({left})"
        return f"{left} {_INFIX[node.target]} {right}"
    args = [_value(scope, a) for a in node.args]
    args += [f"{name}={_value(scope, v)}" for name, v in node.kwargs.items() if v is not None]
    if is_factory(node):
        args.append(f"device={scope.device()}")
    if node.target in _METHODS:
        return f"{args[0]}.{node.target.__name__}({', '.join(args[1:])})"  # type: ignore[union-attr]
    name = target_name(node.target)
    if name.startswith("Tensor."):
        return f"{args[0]}.{name.removeprefix('Tensor.')}({', '.join(args[1:])})"
    if not name.startswith(("torch.", "F.")):
        raise LoweringError(
            f"{name} has no form in a served model",
            got=f"{node.name}: {node.meta['type']}",
            need="an operation of torch, or an op that a pass lowers to a layer",
            from_=node.meta["where"],
            fix="write it with torch functions on (num_tokens, ...) tensors",
        )
    scope.module.use(name.split(".")[0])
    return f"{name}({', '.join(args)})"


def _value(scope: Scope, arg: Any) -> str:
    """An argument; the model's dtype is the one the engine runs in."""
    if arg is MODEL_DTYPE:
        scope.needs_dtype = True
        return "self.dtype"
    if isinstance(arg, torch.dtype):
        scope.module.use("torch")
        return str(arg)
    return scope.value(arg)


def special(*targets: Any) -> Callable[[Emitter], Emitter]:
    def register(fn: Emitter) -> Emitter:
        _SPECIAL.update(dict.fromkeys(targets, fn))
        return fn

    return register


@special(torch.neg)
def _neg(scope: Scope, node: fx.Node) -> str:
    return f"-{scope.value(node.args[0])}"


@special(torch.einsum)
def _einsum(scope: Scope, node: fx.Node) -> str:
    scope.module.use("torch")
    return f"torch.einsum({', '.join(scope.value(a) for a in node.args)})"


@special(operator.getitem)
def _getitem(scope: Scope, node: fx.Node) -> str:
    index = node.args[1]
    parts = index if isinstance(index, tuple) and index else (index,)
    return f"{scope.value(node.args[0])}[{', '.join(_index(scope, p) for p in parts)}]"


def _index(scope: Scope, part: Any) -> str:
    if part is Ellipsis:
        return "..."
    if isinstance(part, slice):
        ends = ["" if e is None else scope.value(e) for e in (part.start, part.stop)]
        step = "" if part.step is None else f":{scope.value(part.step)}"
        return f"{ends[0]}:{ends[1]}{step}"
    return scope.value(part)


@special(ops.embed)
def _embed(scope: Scope, node: fx.Node) -> str:
    scope.module.use("F")
    return f"F.embedding({scope.value(node.args[0])}, {scope.value(node.args[1])})"


@special(ops.unembed)
def _unembed(scope: Scope, node: fx.Node) -> str:
    scope.module.use("F")
    return f"F.linear({scope.value(node.args[0])}, {scope.value(node.args[1])})"


@special(ops.swiglu)
def _swiglu(scope: Scope, node: fx.Node) -> str:
    scope.module.use("F")
    gate, up = (scope.value(a) for a in node.args)
    return f"F.silu({gate}) * {up}"


@special(F.gelu)
def _gelu(scope: Scope, node: fx.Node) -> str:
    approximate: Any = node.kwargs.get("approximate", "none")
    return _gelu_of(scope, scope.value(node.args[0]), approximate)


def _gelu_of(scope: Scope, x: str, approximate: str) -> str:
    if approximate == "tanh":
        return f"{scope.module.help('gelu_tanh')}({x})"
    scope.module.use("F")
    return f"F.gelu({x})"


@special(ops.geglu)
def _geglu(scope: Scope, node: fx.Node) -> str:
    gate, up = (scope.value(a) for a in node.args)
    approximate: Any = node.kwargs["approximate"]
    return f"{_gelu_of(scope, gate, approximate)} * {up}"


@special(ops.rms_norm)
def _rms_norm(scope: Scope, node: fx.Node) -> str:
    x, weight = (scope.value(a) for a in node.args)
    offset = node.kwargs.get("offset", 0.0)
    settings = f"eps={node.kwargs['eps']}, offset={offset}"
    if node.kwargs.get("rounds_once"):
        settings += ", rounds_once=True"
    return f"{scope.module.help('normed')}({x}, {weight}, {settings})"


@special(ops.layer_norm)
def _layer_norm(scope: Scope, node: fx.Node) -> str:
    scope.module.use("F")
    args = [scope.value(a) for a in node.args]
    settings = [*args[1:], f"eps={node.kwargs['eps']}"]
    return f"F.layer_norm({args[0]}, {args[0]}.shape[-1:], {', '.join(settings)})"


@special(collectives.all_reduce)
def _all_reduce(scope: Scope, node: fx.Node) -> str:
    if not tensor_type(node).dtype.is_floating_point:
        return f"{scope.module.help('numbers_summed')}({scope.value(node.args[0])})"
    # Kernels read memory from one end to the other: of a view, other elements.
    name = scope.module.use("tensor_model_parallel_all_reduce")
    return f"{name}({scope.value(node.args[0])}.contiguous())"


@special(rms_norm_over_ranks)
def _rms_norm_over_ranks(scope: Scope, node: fx.Node) -> str:
    args = [scope.value(a) for a in node.args[:2]]
    args += [f"{name}={scope.value(v)}" for name, v in node.kwargs.items()]
    return f"{scope.module.help('rms_norm_over_ranks')}({', '.join(args)})"


@special(max_over_ranks)
def _max_over_ranks(scope: Scope, node: fx.Node) -> str:
    x, dim, least = node.args[:3]
    name = scope.module.help("min_over_ranks" if least else "max_over_ranks")
    return f"{name}({scope.value(x)}, dim={dim})"


@special(widened)
def _widened(scope: Scope, node: fx.Node) -> str:
    return f"{scope.value(node.args[0])}.float()"


@special(more_than_zero)
def _more_than_zero(scope: Scope, node: fx.Node) -> str:
    return f"{scope.value(node.args[0])} + torch.finfo({tensor_type(node).dtype}).eps"


@special(share_of_mean)
def _share_of_mean(scope: Scope, node: fx.Node) -> str:
    x, dim, keepdim, part, count = (scope.value(a) for a in node.args)
    return f"{x}.mean({dim}, {keepdim}) * ({part} / {count})"


@special(collectives.all_gather)
def _all_gather(scope: Scope, node: fx.Node) -> str:
    x, dim, units = node.args[:3]
    assert isinstance(units, int)
    at = x.meta["placement"]  # type: ignore[union-attr]
    if not scope.module.exact.divides(at.axis, units):  # a block may lie on several ranks
        name = scope.module.help("whole_of_blocks")
        return f"{name}({scope.value(x)}, dim={dim}, units={units})"
    if not tensor_type(x).dtype.is_floating_point:  # type: ignore[arg-type]
        return f"{scope.module.help('all_gathered')}({scope.value(x)}, dim={dim})"
    name = scope.module.use("tensor_model_parallel_all_gather")
    return f"{name}({scope.value(x)}.contiguous(), dim={dim})"


@special(collectives.take_block)
def _take_block(scope: Scope, node: fx.Node) -> str:
    x, dim, units = node.args[:3]
    return f"{scope.module.help('own_block')}({scope.value(x)}, dim={dim}, units={units})"
