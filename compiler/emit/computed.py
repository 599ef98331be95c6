"""What is computed of one parameter alone: when it is loaded, and not at every step.

    a = self.A_log.to(torch.float32); b = a.reshape((16,)); c = torch.exp(b); y = x * c
->
    self.A_log = nn.Parameter(torch.empty(16, dtype=torch.float32), requires_grad=False)
    ... {"weight_loader": computed_loader(lambda x: torch.exp(x.to(torch.float32)), self.dtype)}
    y = x * self.A_log

A weight loader runs whenever the engine loads, at its start and when weights are pushed: so what is
kept is never that of old weights. It knows no module, as one that did would keep it alive: vLLM
remembers loaders. So shapes are left out of what it computes, which is done element by element.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from compiler.ir import MODEL_DTYPE, Block, tensor_type
from compiler.placement import REPLICATE, Shard
from compiler.rewrite import is_call
from compiler.rules.elementwise import is_elementwise

_RESHAPES = (torch.reshape, torch.flatten, torch.unflatten, torch.unsqueeze, torch.squeeze)
# Elements that may take more bytes than the parameter: of a large matrix that would waste memory.
_SMALL = 1 << 16


@dataclass(frozen=True)
class Computed:
    """What is kept of a parameter.

    Args:
        param: its first node.
        chain: the nodes that compute it, in order: each of the one before, or of the parameter.
    """

    param: fx.Node
    chain: tuple[fx.Node, ...]

    @property
    def value(self) -> fx.Node:
        return self.chain[-1]

    @property
    def operations(self) -> list[fx.Node]:
        """Those that change elements."""
        return [node for node in self.chain if node.target not in _RESHAPES]


def computed_parameters(block: Block, names: Iterable[str]) -> dict[str, Computed]:
    """Of a block's parameters that no layer holds, those of which only a value is read."""
    nodes: dict[str, list[fx.Node]] = {}
    for node in block.graph.nodes:
        if node.op == "get_attr":
            nodes.setdefault(str(node.target), []).append(node)
    found = {}
    for name in names:
        if name in nodes and len(nodes[name]) == 1:
            chain = _chain(nodes[name][0])
            if any(node.target not in _RESHAPES for node in chain):
                found[name] = Computed(nodes[name][0], chain)
    return found


def _chain(param: fx.Node) -> tuple[fx.Node, ...]:
    """The steps from a parameter on that are one after another and of it alone."""
    chain: list[fx.Node] = []
    node = param
    while len(node.users) == 1:
        (user,) = node.users
        if not _is_step(user, node):
            break
        chain.append(user)
        node = user
    while chain and not _is_worth_it(param, chain[-1]):
        chain.pop()
    return tuple(chain)


def _is_step(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node does something to each element of x, with numbers alone, or reshapes x."""
    if is_call(node, *_RESHAPES):
        return node.args[0] is x
    if node.op != "call_function" or not is_elementwise(node.target):
        return False
    given = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]
    if given != [x] or node.all_input_nodes != [x]:
        return False
    if tensor_type(node).shape != tensor_type(x).shape:
        return False
    # The engine's own dtype is not known where the file is written.
    return not (node.target is Tensor.to and tensor_type(node).dtype == MODEL_DTYPE)


def _is_worth_it(param: fx.Node, value: fx.Node) -> bool:
    at = value.meta["placement"]
    if at != REPLICATE and not isinstance(at, Shard):
        return False
    before, after = tensor_type(param), tensor_type(value)
    count = prod(after.shape)  # type: ignore[arg-type]
    return count <= _SMALL or after.dtype.itemsize <= before.dtype.itemsize
