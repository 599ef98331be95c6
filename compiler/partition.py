"""The global-view program -> the program of one rank along a mesh axis, with explicit collectives.

Placements are propagated forward from the parameters' PartitionSpecs and the rules of
`compiler.rules`; where an operand lies otherwise than its operation needs it, a collective is put
in between. Sizes stay symbolic in the number of ranks: one partitioned program serves every
`tp` that its `needs` allow.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from compiler import collectives, sequence
from compiler.associative import associative
from compiler.cut_associative import cut_associative
from compiler.cut_recurrence import cut_recurrence
from compiler.ir import Block, Program, TensorType, target_name, tensor_type
from compiler.names import unique
from compiler.needs import Exact, Need
from compiler.placement import REPLICATE, Partial, Placement, Replicate, Shard
from compiler.recurrence import recurrence
from compiler.rules import (
    TOKENS,
    Decision,
    Spelled,
    Steps,
    View,
    decide,
    gathered,
    is_cut,
    told_apart,
    vocab_embed,
)
from compiler.sequence import by_sequence, is_by_sequence
from compiler.strict import Strict, refuses, ways_out
from compiler.verify import verify
from compiler.why import fix_of_parts
from funcmodels.errors import LoweringError
from funcmodels.sharding import partition_spec
from funcmodels.source import SourceLine
from funcmodels.spec import Model


@dataclass(frozen=True)
class Gathered:
    """An operation that had no rule for its operands' placements."""

    block: str
    node: str
    operation: str
    where: SourceLine


@dataclass(eq=False)
class Partitioned(Program):
    """The program of one rank of mesh axis `axis`."""

    axis: str = "tp"
    needs: list[Need] = field(default_factory=list)
    gathered: list[Gathered] = field(default_factory=list)


def partition(
    program: Program, axis: str = "tp", *, strict: Strict = False, sequence: bool = False
) -> Partitioned:
    """Partition a program along one mesh axis.

    Args:
        program: in the global view.
        axis: the mesh axis.
        strict: refuse an operation that has no rule, instead of gathering its operands, but for
            places that `fm.allow` names.
        sequence: cut what stands between the layers that ranks share over tokens.
    Raises:
        LoweringError: with strict, the first operation that has no rule.
    """
    return _Partitioner(program, axis, strict, sequence).run()


class _Partitioner:
    def __init__(self, program: Program, axis: str, strict: Strict, sequence: bool) -> None:
        self.source = program
        self.axis = axis
        self.strict = strict
        self.sequence = sequence
        self.done: dict[Any, tuple[Block, tuple[Placement, ...]]] = {}
        self.needs: dict[tuple, Need] = {}
        self.gathered: list[Gathered] = []

    def run(self) -> Partitioned:
        start: Placement = Shard(0, 2, TOKENS) if self.axis == TOKENS else REPLICATE
        root, _ = self.block(self.source.root, (start,) * len(self.source.root.inputs), root=True)
        blocks = {block.name: block for block, _ in self.done.values() if block is not root}
        # Where nothing demands a division, a parameter's block may lie on several ranks.
        exact = Exact(self.needs.values())
        for block in (*blocks.values(), root):
            _sum_over_replicas(block, self.axis, exact)
            if self.sequence:  # gathers that became another collective
                block.graph.eliminate_dead_code(lambda node: node.op != "call_function")
        found = Partitioned(
            self.source.model, root, blocks, self.axis, list(self.needs.values()), self.gathered
        )
        verify(found)
        return found

    def block(
        self, block: Block, inputs: tuple[Placement, ...], root: bool = False
    ) -> tuple[Block, tuple[Placement, ...]]:
        """A block for the given placements of its inputs, and those of its results."""
        key = (block, inputs)  # itself: steps of several recurrences may have one name
        if key not in self.done:
            taken = {b.name for b, _ in self.done.values()}
            graph, results = _BlockPartitioner(self, block, inputs, root).run()
            name = unique(block.name, taken)
            local = replace(block, name=name, graph=graph)
            self.done[key] = (local, results)
        return self.done[key]

    def need(
        self, axis: str, units: int, exact: bool, why: str, where: SourceLine, of: str = ""
    ) -> None:
        if axis != TOKENS:
            found = Need(axis, units, exact, why, where, of)
            self.needs.setdefault((axis, units, exact), found)

    def note_gather(self, block: Block, node: fx.Node, axis: str = "") -> None:
        name = target_name(node.target)
        where = node.meta["where"]
        if refuses(self.strict, where):
            raise LoweringError(
                f"no sharding rule for {name} over a sharded dim",
                node=f"{node.format_node()}",
                from_=where,
                fix=f"{fix_of_parts(node, axis) or 'shard its axis differently'}, "
                f"or allow gathering here: {ways_out(where)}",
            )
        self.gathered.append(Gathered(block.name, node.name, name, node.meta["where"]))


class _BlockPartitioner:
    """One block: a new graph, with the placement of every value."""

    def __init__(
        self, whole: _Partitioner, block: Block, inputs: tuple[Placement, ...], root: bool
    ) -> None:
        self.whole = whole
        self.axis = whole.axis
        self.source = block
        self.inputs = iter(inputs)
        self.root = root
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.at: dict[fx.Node, Any] = {}
        self.moved: dict[tuple[fx.Node, str], fx.Node] = {}

    def run(self) -> tuple[fx.Graph, tuple[Placement, ...]]:
        for node in self.source.graph.nodes:
            getattr(self, node.op)(node)
        return self.graph, tuple(self._result_placement(n) for n in self.source.results)

    def _result_placement(self, node: fx.Node) -> Placement:
        at = self.at[node]
        if self.root and self.axis != TOKENS:
            return REPLICATE
        return self._settled(node) if isinstance(at, Partial) else at

    def _settled(self, node: fx.Node) -> Placement:
        """Where a pending sum goes when a block or its caller ends it."""
        return by_sequence(node.meta["type"]) if self.whole.sequence else REPLICATE

    # One method for each kind of node

    def placeholder(self, node: fx.Node) -> None:
        self._put(node, self.graph.placeholder(str(node.target)), next(self.inputs))

    def get_attr(self, node: fx.Node) -> None:
        model: Model = self.whole.source.model
        param = self.source.params[str(node.target)]
        at: Placement = REPLICATE
        for dim, mesh_axis in enumerate(partition_spec(param, model.table)):
            if mesh_axis == self.axis:
                at = Shard(dim, param.shape[dim], param.axes[dim])
                self.whole.need(
                    param.axes[dim],
                    param.shape[dim],
                    False,
                    f"{node.target} is sharded",
                    param.where,
                )
        self._put(node, self.graph.create_node("get_attr", node.target, name=node.name), at)

    def call_module(self, node: fx.Node) -> None:
        args = list(node.args)
        placements = tuple(
            self._settled(a) if isinstance(self.at[a], Partial) else self.at[a]  # type: ignore[index,arg-type]
            for a in args
        )
        callee, results = self.whole.block(self.whole.source.blocks[str(node.target)], placements)
        new = self.graph.create_node(
            "call_module",
            callee.name,
            tuple(self._as(a, at, node) for a, at in zip(args, placements, strict=True)),  # type: ignore[arg-type]
            name=node.name,
        )
        new.meta["binding"] = node.meta["binding"]
        single = isinstance(node.meta["type"], TensorType)
        self._put(node, new, results[0] if single else results)

    def call_function(self, node: fx.Node) -> None:
        if _is_idle(node):
            (same,) = node.all_input_nodes
            self.env[node], self.at[node] = self.env[same], self.at[same]
            return
        if node.target in (recurrence, associative):
            cut = cut_recurrence if node.target is recurrence else cut_associative
            cut(self, node)
            return
        at = sequence.seen(node, self.at) if self.whole.sequence else self.at
        view, stands_for = told_apart(View(node, at, self.axis))
        for stand_in, value in stands_for.items():
            self.env[stand_in], self.at[stand_in] = self.env[value], self.at[value]
        decision, is_gathered = decide(view)
        if isinstance(decision, Spelled):
            if self._spell(node, decision):
                _forget(stands_for)
                return
            decision, is_gathered = gathered(view)
        if is_gathered:
            shards = (at[n] for n in view.tensors if isinstance(at[n], Shard))
            self.whole.note_gather(self.source, node, next(shards).axis)
        for need in decision.needs:
            self.whole.need(need.axis, need.units, True, need.why, node.meta["where"])
        new = self._local(view.node, decision, view.placements)
        _forget(stands_for)
        self._put(node, new, decision.output)
        if new.target is vocab_embed:  # now, for each use: the engine's layer sums at once
            to = self._settled(node)
            self.env[node], self.at[node] = self._as(node, to, node), to

    def _local(self, node: fx.Node, decision: Decision, at: dict[fx.Node, Any]) -> fx.Node:
        """The node on one rank: its operands brought to where the rule wants them."""
        cut = is_cut(decision.output) and not decision.independent

        def operand(old: fx.Node) -> fx.Node:
            if not isinstance(old.meta["type"], TensorType):
                return self.env[old]
            to: Any = decision.inputs.get(old, at[old])
            new = self._as(old, to, node)
            dtype = tensor_type(old).dtype
            has_gradient = dtype.is_floating_point or dtype.is_complex
            if cut and isinstance(to, Replicate) and has_gradient:
                return self._collective(new, collectives.vary, (), REPLICATE, node)
            return new

        args = node.args if decision.args is None else decision.args
        kwargs = node.kwargs if decision.kwargs is None else decision.kwargs
        target = decision.target or node.target
        return self.graph.create_node(
            "call_function",
            target,
            map_arg(args, operand),
            map_arg(kwargs, operand),
            name=node.name,
        )

    def _spell(self, node: fx.Node, spelled: Spelled) -> bool:
        """Write a node in steps, each partitioned by its own rule; False where there are none."""
        steps = _Steps(self, node)
        found = spelled.write(steps)
        if found is not None:
            self.env[node], self.at[node] = self.env[found], self.at[found]
        steps.forget()
        return found is not None

    def output(self, node: fx.Node) -> None:
        results = tuple(self._as(r, self._result_placement(r), node) for r in self.source.results)
        self.graph.output(results)

    # Placements

    def _put(self, old: fx.Node, new: fx.Node, at: Any) -> None:
        new.meta.update(type=old.meta["type"], where=old.meta["where"], placement=at)
        self.env[old] = new
        self.at[old] = at

    def _as(self, old: fx.Node, to: Placement, user: fx.Node) -> fx.Node:
        """The local node of a value, in the placement a user needs."""
        new, at = self.env[old], self.at[old]
        if at == to:
            return new
        if isinstance(at, Partial) and is_by_sequence(to):
            assert isinstance(to, Shard)
            return self._collective(new, collectives.reduce_scatter, (to.dim,), to, user)
        if isinstance(at, Partial):
            new, at = self._collective(new, collectives.all_reduce, (), REPLICATE, user), REPLICATE
        if isinstance(at, Shard):
            args = (at.dim, at.units)
            new, at = (
                self._collective(new, collectives.all_gather, args, REPLICATE, user),
                REPLICATE,
            )
        if isinstance(to, Shard):
            where = user.meta.get("where", old.meta["where"])
            self.whole.need(to.axis, to.units, False, f"{old.name} is cut into blocks", where)
            new = self._collective(new, collectives.take_block, (to.dim, to.units), to, user)
        assert not isinstance(to, Partial), "nothing is made partial on purpose"
        return new

    def _collective(
        self, x: fx.Node, target: Any, args: tuple, at: Placement, user: fx.Node
    ) -> fx.Node:
        """A collective of a value, the same one for all who need it."""
        if target is collectives.vary and x.target is collectives.all_gather:
            source, dim, units = x.args[:3]
            if units == sequence.BLOCKS:  # both at once: its gradient is a reduce-scatter
                assert isinstance(source, fx.Node)
                return self._collective(source, collectives.gather_vary, (dim,), at, user)
        key = (x, f"{target.__name__}{args}")
        if key not in self.moved:
            new = self.graph.call_function(target, (x, *args, self.axis))
            # A sum is asked for by what left it pending; the other collectives by who needs them.
            asker = x if target is collectives.all_reduce else user
            new.meta.update(type=x.meta["type"], where=asker.meta.get("where", x.meta["where"]))
            new.meta["placement"] = at
            self.moved[key] = new
        return self.moved[key]


class _Steps(Steps):
    """Nodes beside the global view's own, forgotten once they are partitioned."""

    def __init__(self, to: _BlockPartitioner, node: fx.Node) -> None:
        self.to = to
        self.node = node
        self.axis = to.axis
        self.graph = fx.Graph()

    def __call__(
        self,
        name: str,
        target: Any,
        *args: Any,
        over: int | None = None,
        like: fx.Node | None = None,
        dtype: torch.dtype | None = None,
        shape: tuple | None = None,
    ) -> fx.Node:
        nodes = [arg for arg in args if isinstance(arg, fx.Node)]
        kind = tensor_type(like or (nodes or [self.node])[0])
        sizes = shape or tuple(1 if i == over else n for i, n in enumerate(kind.shape))
        step = self.graph.create_node("call_function", target, args, name=name)
        step.meta.update(type=TensorType(dtype or kind.dtype, sizes), where=self.node.meta["where"])
        self.to.call_function(step)
        return step

    def forget(self) -> None:
        """So that the operands, which are others' too, have no users here."""
        for step in self.graph.nodes:
            step.args = ()


def _forget(stands_for: dict[fx.Node, fx.Node]) -> None:
    """So that the operands of a call told apart have no user there."""
    for stand_in in stands_for:
        for call in list(stand_in.users):
            call.args, call.kwargs = (), {}


def _is_idle(node: fx.Node) -> bool:
    """Whether a node gives its operand back: `x.flatten()` of a vector."""
    if node.target not in (torch.reshape, torch.flatten):
        return False
    (x,) = node.all_input_nodes
    return x.meta["type"] == node.meta["type"]


def _sum_over_replicas(block: Block, axis: str, exact: Exact) -> None:
    """Mark parameters of which a block may lie on several ranks: their gradients are summed."""
    for node in list(block.graph.nodes):
        at = node.meta.get("placement")
        if node.op != "get_attr" or not isinstance(at, Shard):
            continue
        if exact.divides(at.axis, at.units):
            continue
        users = list(node.users)
        with block.graph.inserting_after(node):
            new = block.graph.call_function(collectives.replica_sum, (node, at.units, axis))
        new.meta.update(node.meta)
        for user in users:
            user.replace_input_with(node, new)
