"""Each use of a parameter as a parameter of its own: a served model's layers own theirs.

Training reads parameters as a user arranged them. In a served model a matrix belongs to one layer,
which quantisation and adapters know by its place. So here

- a parameter of which only elements of its first dim are read, as of weights stacked over layers,
  becomes as many parameters, and the elements that blocks are given become theirs;
- a parameter that several calls, norms or layers read becomes a copy for each,
- parameters that share a tensor of the checkpoint have one each (`compiler.shared_tensors`).

The loader hands out the checkpoint's tensors accordingly.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from compiler.ir import Block, Program, TensorType, binding
from compiler.names import unique
from compiler.rewrite import copy_block, is_call, is_param
from compiler.split import after_unembedding
from compiler.taken_apart import Made, element_of, is_listed, with_index
from funcmodels import ops
from funcmodels.sharding import partition_spec
from funcmodels.spec import Model, Param

_NORMS = (ops.rms_norm, ops.layer_norm)
_VOCAB = (ops.embed, ops.unembed)
_MOST = 512  # elements that a parameter is taken apart into


def own_parameters(program: Program) -> Program:
    """A traced program with a parameter for each use. What it computes stays the same."""
    blocks = {name: copy_block(block) for name, block in program.blocks.items()}
    for block in blocks.values():
        _copy_bindings(block)
    root = copy_block(program.root)
    _copy_bindings(root)
    new = replace(program, root=root, blocks=blocks)
    made = Made(program.model)
    while _take_elements(new, made):  # what blocks are given may be taken apart again
        _give_to_blocks(new)
    _prune(new)
    _copy_for_each_use(new, made)
    if made.elements or made.copies or made.shared:
        new.model = made.model()
    return new


def _copy_bindings(block: Block) -> None:
    for call in block.calls:
        call.meta["binding"] = dict(binding(call))


def _calls(program: Program) -> Iterator[tuple[Block, fx.Node, Block]]:
    """Each call: the block it is in, and the one it calls."""
    for block in program.all():
        for call in block.calls:
            yield block, call, program.blocks[str(call.target)]


# Elements


Key = tuple[str, str]  # a block's name and a parameter's in it


def _take_elements(program: Program, made: Made) -> bool:
    """Parameters of which only elements are read -> a parameter for each; whether there are any."""
    before = len(made.elements)
    blocks = {block.name: block for block in program.all()}
    reads = {name: _reads(block) for name, block in blocks.items()}
    if not any(
        _accesses(blocks[b].params[p], nodes) for b in reads for p, nodes in reads[b].items()
    ):
        return False
    group: dict[Key, set[Key]] = {
        (b.name, p): {(b.name, p)} for b in blocks.values() for p in b.params
    }
    for caller, call, callee in _calls(program):
        for inner, outer in binding(call).items():
            joined = group[caller.name, outer] | group[callee.name, inner]
            for key in joined:
                group[key] = joined
    found = {(b, p): _accesses(blocks[b].params[p], reads[b].get(p, [])) for b, p in group}
    root = program.root.name
    for members in {id(m): m for m in group.values()}.values():
        paths = sorted(p for b, p in members if b == root)
        used = {i for key in members for _, i, _ in found[key] or ()}
        if any(found[key] is None for key in members) or not _worth(made, paths, used):
            continue
        names: dict[Key, list[str]] = {}
        for block, name in sorted(members):
            param = blocks[block].params.pop(name)
            own = [f"{name}.{i}" for i in range(param.shape[0])]
            names[block, name] = made.take_elements(name) if block == root else own
            elements = {element: element_of(param, None) for element in names[block, name]}
            blocks[block].params.update(elements)
            _read_elements(blocks[block], found[block, name] or [], names[block, name])
        for caller, call, callee in _calls(program):
            bound = binding(call)
            for inner in [k for k in bound if (callee.name, k) in members]:
                outer = bound.pop(inner)
                pairs = names[callee.name, inner], names[caller.name, outer]
                bound.update(zip(*pairs, strict=True))
    return len(made.elements) > before


def _worth(made: Made, paths: list[str], used: set[int]) -> bool:
    """Whether parameters of these paths can be taken apart, and enough of them is read."""
    for path in paths:
        param, map_ = made.params[path], made.map_of(path)
        count = param.shape[0] if param.shape else 0
        if not 2 <= count <= _MOST or len(used) * 2 < count:
            return False
        if partition_spec(param, made.source.table)[0] is not None:
            return False
        stored = map_.layout.split()
        if param.axes[0] not in map_.spread and stored[:1] != [param.axes[0]]:
            return False
    return bool(paths)


Access = tuple[fx.Node, int, tuple]  # a node that reads an element, which, and what of it


def _reads(block: Block) -> dict[str, list[fx.Node]]:
    """The nodes that read each parameter."""
    found: dict[str, list[fx.Node]] = {}
    for node in block.graph.nodes:
        if node.op == "get_attr":
            found.setdefault(str(node.target), []).append(node)
    return found


def _accesses(param: Param, reads: list[fx.Node]) -> list[Access] | None:
    """Where elements of a parameter are read; None where it is read otherwise."""
    found: list[Access] = []
    count = param.shape[0] if param.shape else 0
    for node in reads:
        for user in node.users:
            parts: list[fx.Node] = [user]
            if is_call(user, torch.unbind) and not user.kwargs and user.args[1:] in ((), (0,)):
                parts = list(user.users)
            for part in parts:
                index = part.args[1] if is_call(part, operator.getitem) else None
                first, *rest = index if isinstance(index, tuple) and index else (index,)
                if not isinstance(first, int) or isinstance(first, bool):
                    return None
                found.append((part, first % count, tuple(rest)))
    return found


def _read_elements(block: Block, accesses: list[Access], names: list[str]) -> None:
    """Let the elements be read where they were taken out of the whole."""
    own: dict[int, fx.Node] = {}
    for node, i, rest in accesses:
        if i not in own:
            first = next(iter(block.graph.nodes))
            with block.graph.inserting_before(first):
                own[i] = block.graph.create_node("get_attr", names[i], name=node.name)
            kind = block.params[names[i]]
            dtype = node.meta["type"].dtype
            own[i].meta.update(node.meta, type=TensorType(dtype, tuple(kind.shape)))
        new = own[i]
        if rest:
            with block.graph.inserting_before(node):
                new = block.graph.call_function(operator.getitem, (new, rest))
            new.meta.update(node.meta)
        node.replace_all_uses_with(new)
    for node in reversed(list(block.graph.nodes)):
        if node.op in ("get_attr", "call_function") and not node.users:
            block.graph.erase_node(node)


# Elements as arguments


def _give_to_blocks(program: Program) -> None:
    """Arguments that are parameters in every call of a block -> parameters of the block."""
    for block in reversed(list(program.blocks.values())):  # callers first
        calls = [(caller, call) for caller, call, callee in _calls(program) if callee is block]
        for i in reversed(range(len(block.inputs))):
            given = [(caller, call.args[i]) for caller, call in calls]
            params = [caller.params[str(a.target)] for caller, a in given if is_param(a)]  # type: ignore[union-attr]
            if len(params) < len(given) or not given or not _alike(program.model, params):
                continue
            name = unique(block.inputs[i].name, block.params)
            block.params[name] = params[0]
            _read_parameter(block, block.inputs[i], name)
            for _, call in calls:
                binding(call)[name] = str(call.args[i].target)  # type: ignore[union-attr]
                call.args = (*call.args[:i], *call.args[i + 1 :])


def _alike(model: Model, params: list[Param]) -> bool:
    """Whether parameters make one block: its graph is partitioned once for all of its calls."""
    kinds = {(p.axes, p.shape, p.dtype, partition_spec(p, model.table)) for p in params}
    return len(kinds) == 1


def _read_parameter(block: Block, placeholder: fx.Node, name: str) -> None:
    after = next(n for n in block.graph.nodes if n.op != "placeholder")
    with block.graph.inserting_before(after):
        new = block.graph.create_node("get_attr", name)
    new.meta = dict(placeholder.meta)
    placeholder.replace_all_uses_with(new)
    block.graph.erase_node(placeholder)


def _prune(program: Program) -> None:
    """Forget parameters that a block does not use, callees first."""
    for block in program.all():
        for node in [n for n in block.graph.nodes if n.op == "get_attr" and not n.users]:
            block.graph.erase_node(node)
        used = {str(n.target) for n in block.graph.nodes if n.op == "get_attr"}
        for call in block.calls:
            own = program.blocks[str(call.target)].params
            call.meta["binding"] = {k: v for k, v in binding(call).items() if k in own}
            used |= set(binding(call).values())
        block.params = {k: v for k, v in block.params.items() if k in used}


# Copies


@dataclass
class _Use:
    """One use of a parameter: a call's, by the callee's name for it, or that of some nodes."""

    call: fx.Node | None = None
    inner: str = ""
    users: list[fx.Node] = field(default_factory=list)
    is_vocab: bool = False


def _copy_for_each_use(program: Program, made: Made) -> None:
    """A parameter that is used in several ways -> one for each of them, callees first."""
    added: dict[str, dict[str, str]] = {}  # block -> its new parameters, and of which they are
    for block in program.all():
        for call in block.calls:
            bound = binding(call)
            bound |= {new: bound[old] for new, old in added[str(call.target)].items()}
        is_root = block is program.root
        added[block.name] = {}
        apart = after_unembedding(program) if is_root else set()
        for name, uses in _uses(block, program.model, apart).items():
            if len(uses) < 2:
                continue
            uses.sort(key=lambda use: not use.is_vocab)
            called = any(use.call is not None for use in uses)
            numbered = is_root and called and not is_listed(name) and not uses[0].is_vocab
            names = [name, *(f"again{j}_{name}" for j in range(1, len(uses)))]
            if numbered:
                names = [with_index(name, name, j) for j in range(len(uses))]
            param = block.params.pop(name)
            for new, use in zip(names, uses, strict=True):
                block.params[new] = param
                _let_read(block, use, name, new)
            if is_root:
                made.copy(name, names)
            added[block.name] |= dict.fromkeys(names[1:], name)


def _uses(block: Block, model: Model, apart: set[fx.Node]) -> dict[str, list[_Use]]:
    """The uses of each parameter, in order. All that plain torch reads is one.

    So are embedding and unembedding where the engine has a layer for a tied vocabulary. What is
    computed apart from the rest, with the logits, reads parameters of its own.
    """
    found: dict[str, list[_Use]] = {}
    rest: dict[str, _Use] = {}
    last: dict[str, _Use] = {}
    vocab: dict[str, _Use] = {}
    for node in block.graph.nodes:
        if node.op == "call_module":
            for inner, outer in binding(node).items():
                found.setdefault(outer, []).append(_Use(node, inner))
        for read in dict.fromkeys(n for n in node.all_input_nodes if n.op == "get_attr"):
            name = str(read.target)
            uses = found.setdefault(name, [])
            if is_call(node, *_NORMS):
                uses.append(_Use(users=[node]))
                continue
            by_rows = bool(partition_spec(block.params[name], model.table)[:1] == ("tp",))
            kind = last if node in apart else rest
            if is_call(node, *_VOCAB) and by_rows:
                kind = vocab
            if is_call(node, ops.embed) and not by_rows:
                uses.append(_Use(users=[node], is_vocab=True))
                continue
            if name not in kind:
                kind[name] = _Use(is_vocab=kind is vocab)
                uses.append(kind[name])
            kind[name].users.append(node)
    return found


def _let_read(block: Block, use: _Use, old: str, new: str) -> None:
    """Let one use read the parameter `new`."""
    if new == old:
        return
    if use.call is not None:
        binding(use.call)[use.inner] = new
        return
    for user in use.users:
        for node in [n for n in user.all_input_nodes if n.op == "get_attr" and n.target == old]:
            with block.graph.inserting_before(user):
                copy = block.graph.create_node("get_attr", new, name=node.name)
            copy.meta = dict(node.meta)
            user.replace_input_with(node, copy)
            if not node.users:
                block.graph.erase_node(node)
