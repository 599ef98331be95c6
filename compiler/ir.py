"""The intermediate representation: one `torch.fx.Graph` a block, with types, lines and placements.

A `Program` is a root block and the blocks it calls. In a block's graph

- a `placeholder` is an activation that comes in,
- a `get_attr` is a parameter, by its name in the block (`q`, `attn.q` in a caller),
- a `call_module` calls another block; `meta["binding"]` says which of the caller's parameters are
  which of the callee's,
- a `call_function` is a torch function or one of `funcmodels.ops`.

`meta` of each node: "type" (`TensorType`, or a tuple of them), "where" (`SourceLine`), and once
partitioned "placement". Sizes that are not known when tracing are `Sym`s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from funcmodels.spec import Model, Param

# Models are traced in this dtype, which stands for whatever dtype the weights will have: the one
# floating dtype that model code does not name, so that `x.float()` and `x.to(x.dtype)` stay apart.
MODEL_DTYPE = torch.float16


@dataclass(frozen=True)
class Sym:
    """A size known only when running: an expression over a graph's symbols, as `num_tokens`."""

    expr: str

    def __str__(self) -> str:
        return self.expr

    def at(self, sizes: dict[str, int]) -> int:
        """The size, given those of the symbols."""
        return int(eval(self.expr, {"__builtins__": {}}, sizes))  # our own sympy text


Size: TypeAlias = "int | Sym"


@dataclass(frozen=True)
class TensorType:
    """Dtype and global shape of a value."""

    dtype: torch.dtype
    shape: tuple[Size, ...]

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class LocalSize:
    """A size on one rank: of `units` blocks of `inner` elements, those that the rank holds.

    `label` is the logical axis that is cut, as "heads", and `axis` the mesh axis, as "tp".
    """

    units: int
    inner: int
    label: str
    axis: str

    def at(self, parts: int) -> int:
        return self.inner * max(1, self.units // parts)

    def __str__(self) -> str:
        whole = f"{self.label}/{self.axis}"
        return whole if self.inner == 1 else f"{whole}*{self.inner}"

    __repr__ = __str__


@dataclass(eq=False)
class Block:
    """A function of a parameter subtree, recorded.

    Args:
        name: unique in the program, a Python identifier: the user's function's name.
        graph: what it does.
        params: its parameters by their names in the block.
        static: the non-tensor arguments it was called with, for printing.
        function: the user's function.
        remat: whether a training step computes what is inside again, and does not keep it.
    """

    name: str
    graph: fx.Graph
    params: dict[str, Param]
    static: dict[str, Any] = field(default_factory=dict)
    function: Callable[..., Any] | None = None
    remat: bool = False

    @property
    def inputs(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes that the block returns, flat."""
        return tuple(self.output.args[0])  # type: ignore[arg-type]

    @property
    def calls(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "call_module"]


@dataclass(eq=False)
class Program:
    """A model as graphs: the root block and every block it reaches, callees before callers."""

    model: Model
    root: Block
    blocks: dict[str, Block]

    def all(self) -> Iterator[Block]:
        yield from self.blocks.values()
        yield self.root


def add_node(
    graph: fx.Graph, op: str, target: Any, args: tuple, kwargs: dict, name: str | None = None
) -> fx.Node:
    """A new node at a graph's insertion point, which is its end if nothing else is said.

    Its arguments come after it is made: `Graph.create_node` would look in each for torch's symbolic
    sizes, which our graphs never hold, and that takes longer than all the rest.
    """
    node = graph.create_node(op, target, name=name)
    node.args = args
    if kwargs:
        node.kwargs = kwargs
    return node


def copy_node(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    """A node of another graph, with its meta, at the end of this one.

    Args:
        env: for each node that it uses, this graph's.
    """
    args: Any = map_arg(node.args, env.__getitem__)
    kwargs: Any = map_arg(node.kwargs, env.__getitem__)
    new = add_node(graph, node.op, node.target, args, kwargs, node.name)
    new.meta = dict(node.meta)
    return new


def is_factory(node: fx.Node) -> bool:
    """Whether a node makes a tensor of nothing, as `torch.arange(16)`: on its inputs' device."""
    return node.op == "call_function" and not node.all_input_nodes


def binding(call: fx.Node) -> dict[str, str]:
    """Callee's parameter name -> caller's, of a call."""
    return call.meta["binding"]


def tensor_type(node: fx.Node) -> TensorType:
    """The type of a node that is one tensor."""
    found = node.meta["type"]
    assert isinstance(found, TensorType), f"{node} is {found}, not one tensor"
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """`model` for the stand-in, torch's own short name otherwise."""
    return "model" if dtype == MODEL_DTYPE else str(dtype).removeprefix("torch.")


# Functions that call themselves otherwise: F.logsigmoid is a log_sigmoid.
_F_NAMES = {
    fn: name
    for name, fn in vars(torch.nn.functional).items()
    if callable(fn)
    and not name.startswith("_")
    and getattr(fn, "__name__", name) != name
    and getattr(torch.nn.functional, fn.__name__, None) is not fn
    and getattr(fn, "__module__", "") == "torch._C._nn"
}


def target_name(target: Any) -> str:
    """How a node's function is written: `ops.attention`, `torch.einsum`, `F.silu`."""
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return f"torch.ops.{target}"
    module = getattr(target, "__module__", None) or ""
    name = _F_NAMES.get(target) or getattr(target, "__name__", str(target))
    if module.startswith("funcmodels.ops"):
        return f"ops.{name}"
    if module.startswith("compiler"):
        return name
    if (
        getattr(torch.nn.functional, name, None) is target
        and getattr(torch, name, None) is not target
    ):
        return f"F.{name}"
    for space in ("linalg", "fft", "special"):
        short = name.removeprefix(f"{space}_")
        if short != name and getattr(getattr(torch, space), short, None) is target:
            return f"torch.{space}.{short}"
    if getattr(torch.Tensor, name, None) is target:
        return f"Tensor.{name}"
    return f"torch.{name}" if getattr(torch, name, None) is target else name
