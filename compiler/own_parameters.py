"""Each use of a parameter as a parameter of its own: a served model's layers own theirs.

Training reads parameters as a user arranged them. In a served model a matrix belongs to one layer,
which quantisation and adapters know by its place. So here

- a parameter of which only elements of its first dim are read, as of weights stacked over layers,
  becomes as many parameters, and the elements that blocks are given become theirs;
- a parameter that several calls, norms or layers read becomes a copy for each.

The loader hands out the checkpoint's tensors accordingly.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, fx

from compiler.ir import Block, Program, TensorType, binding
from compiler.names import unique
from compiler.rewrite import copy_block, is_call, is_param
from funcmodels import ops, tree
from funcmodels.sharding import PartitionSpec, partition_spec
from funcmodels.spec import Model, Param
from funcmodels.weightmap import TensorMap, tensor_map

_NORMS = (ops.rms_norm, ops.layer_norm)
_VOCAB = (ops.embed, ops.unembed)
_MOST = 512  # elements that a parameter is taken apart into


@dataclass(frozen=True, eq=False)
class TakenApart(Model):
    """A model whose parameters are those of another one, by path, some of them taken apart.

    Args:
        elements: path -> the paths of its elements, in order.
        copies: path, there or among the elements -> the paths of its copies.
        split, repeated: the same of the checkpoint's tensors, by name.
    """

    elements: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    copies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    repeated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, weights: Any) -> dict[str, Tensor]:
        """The weights of the model that this one was made from, as this one has them."""
        values = dict(tree.items(weights))
        if self.by_path.keys() <= values.keys():
            return {path: values[path] for path in self.by_path}
        for path, names in self.elements.items():
            values.update(zip(names, values.pop(path).unbind(0), strict=True))
        for path, names in self.copies.items():
            values.update(dict.fromkeys(names, values[path]))
        return {path: values[path] for path in self.by_path}


def own_parameters(program: Program) -> Program:
    """A traced program with a parameter for each use. What it computes stays the same."""
    blocks = {name: copy_block(block) for name, block in program.blocks.items()}
    for block in blocks.values():
        _copy_bindings(block)
    root = copy_block(program.root)
    _copy_bindings(root)
    new = replace(program, root=root, blocks=blocks)
    made = _Made(program.model)
    while _take_elements(new, made):  # what blocks are given may be taken apart again
        _give_to_blocks(new)
    _prune(new)
    _copy_for_each_use(new, made)
    if made.elements or made.copies:
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


class _Made:
    """The parameters of the new model, and of what they were made."""

    def __init__(self, model: Model) -> None:
        self.source = model
        self.params = dict(model.by_path)
        self.elements: dict[str, tuple[str, ...]] = {}
        self.copies: dict[str, tuple[str, ...]] = {}
        self.split: dict[str, tuple[str, ...]] = {}
        self.repeated: dict[str, tuple[str, ...]] = {}

    def model(self) -> TakenApart:
        given = {f.name: getattr(self.source, f.name) for f in fields(Model)}
        given["params"] = self.params
        return TakenApart(
            **given,
            elements=self.elements,
            copies=self.copies,
            split=self.split,
            repeated=self.repeated,
        )

    def map_of(self, path: str) -> TensorMap:
        param = self.params[path]
        return tensor_map(param.hf, path, param.axes, param.shape, param.where)

    def take_elements(self, path: str) -> list[str]:
        """Parameters for the elements of one; their paths."""
        param, map_ = self.params[path], self.map_of(path)
        del self.params[path]
        axis = param.axes[0]
        template, _, layout = (param.hf or path).partition(":")
        spread = axis in map_.spread
        names = [_with_index(path, path, i) for i in range(param.shape[0])]
        for i, name in enumerate(names):
            if spread:
                tensor = template.strip().replace(f"{{{axis}}}", str(i))
            else:
                tensor = _with_index(template.strip(), path, i)
            stored = layout if spread else layout.strip().removeprefix(axis)
            self.params[name] = _element(param, f"{tensor}:{stored}")
        self.elements[path] = tuple(names)
        if not spread:
            made = [_with_index(map_.names[0], path, i) for i in range(len(names))]
            self.split[map_.names[0]] = tuple(made)
        return names

    def copy(self, path: str, names: list[str]) -> None:
        """Parameters of these paths for one, of which the first may be its own."""
        param = self.params.pop(path)
        template, _, layout = (param.hf or path).partition(":")
        parts = path.split(".")
        listed = {k: i for k, i in itertools.pairwise(parts) if i.isdigit()}
        filled = template.strip()
        for key, index in listed.items():
            filled = filled.replace(f"{{{key}}}", index)
        tensors = []
        for j, name in enumerate(names):
            own = filled if name == path else _copied(filled, path, name, j)
            self.params[name] = replace(param, hf=f"{own}:{layout}")
            tensors.append(own)
        self.copies[path] = tuple(names)
        for braces in _fillings(filled, param):
            self.repeated[_fill(filled, braces)] = tuple(_fill(t, braces) for t in tensors)


def _fillings(template: str, param: Param) -> list[dict[str, int]]:
    """The values of the axes that a template spreads over several tensors."""
    found: list[dict[str, int]] = [{}]
    for axis, size in zip(param.axes, param.shape, strict=True):
        if f"{{{axis}}}" in template:
            found = [{**f, axis: i} for f in found for i in range(size)]
    return found


def _fill(template: str, values: dict[str, int]) -> str:
    for axis, i in values.items():
        template = template.replace(f"{{{axis}}}", str(i))
    return template


def _element(param: Param, hf: str | None) -> Param:
    spec = None if param.sharding is None else PartitionSpec(*param.sharding[1:])
    shape = param.shape[1:]
    return replace(param, axes=param.axes[1:], shape=shape, sharding=spec, hf=hf)


def _is_listed(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _with_index(name: str, path: str, index: int) -> str:
    """`layers.attn.q` as `layers.3.attn.q`: the place of an element, as in a list."""
    parts, head = name.split("."), path.split(".")[0]
    if _is_listed(path) or head not in parts:
        last = parts[-1] in ("weight", "bias")
        at = len(parts) - last
    else:
        at = parts.index(head) + 1
    return ".".join([*parts[:at], str(index), *parts[at:]])


def _copied(template: str, path: str, name: str, index: int) -> str:
    """The tensor of a copy: renamed as the copy's path is."""
    if template == path:
        return name
    parts, old, new = template.split("."), path.split("."), name.split(".")
    if len(new) > len(old):
        return _with_index(template, path, index)
    if old[0] in parts:
        return ".".join(new[0] if part == old[0] else part for part in parts)
    return ".".join([*parts[:1], f"again{index}", *parts[1:]])


# Elements


Key = tuple[str, str]  # a block's name and a parameter's in it


def _take_elements(program: Program, made: _Made) -> bool:
    """Parameters of which only elements are read -> a parameter for each; whether there are any."""
    before = len(made.elements)
    blocks = {block.name: block for block in program.all()}
    group: dict[Key, set[Key]] = {
        (b.name, p): {(b.name, p)} for b in blocks.values() for p in b.params
    }
    for caller, call, callee in _calls(program):
        for inner, outer in binding(call).items():
            joined = group[caller.name, outer] | group[callee.name, inner]
            for key in joined:
                group[key] = joined
    found = {key: _accesses(blocks[key[0]], key[1]) for key in group}
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
            elements = {element: _element(param, None) for element in names[block, name]}
            blocks[block].params.update(elements)
            _read_elements(blocks[block], found[block, name] or [], names[block, name])
        for caller, call, callee in _calls(program):
            bound = binding(call)
            for inner in [k for k in bound if (callee.name, k) in members]:
                outer = bound.pop(inner)
                pairs = names[callee.name, inner], names[caller.name, outer]
                bound.update(zip(*pairs, strict=True))
    return len(made.elements) > before


def _worth(made: _Made, paths: list[str], used: set[int]) -> bool:
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


def _accesses(block: Block, name: str) -> list[Access] | None:
    """Where elements of a parameter are read; None where it is read otherwise."""
    found: list[Access] = []
    for node in block.graph.nodes:
        if node.op != "get_attr" or node.target != name:
            continue
        count = block.params[name].shape[0] if block.params[name].shape else 0
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


def _copy_for_each_use(program: Program, made: _Made) -> None:
    """A parameter that is used in several ways -> one for each of them, callees first."""
    added: dict[str, dict[str, str]] = {}  # block -> its new parameters, and of which they are
    for block in program.all():
        for call in block.calls:
            bound = binding(call)
            bound |= {new: bound[old] for new, old in added[str(call.target)].items()}
        is_root = block is program.root
        added[block.name] = {}
        for name, uses in _uses(block).items():
            if len(uses) < 2:
                continue
            uses.sort(key=lambda use: not use.is_vocab)
            called = any(use.call is not None for use in uses)
            numbered = is_root and called and not _is_listed(name) and not uses[0].is_vocab
            names = [name, *(f"again{j}_{name}" for j in range(1, len(uses)))]
            if numbered:
                names = [_with_index(name, name, j) for j in range(len(uses))]
            param = block.params.pop(name)
            for new, use in zip(names, uses, strict=True):
                block.params[new] = param
                _let_read(block, use, name, new)
            if is_root:
                made.copy(name, names)
            added[block.name] |= dict.fromkeys(names[1:], name)


def _uses(block: Block) -> dict[str, list[_Use]]:
    """The uses of each parameter, in order. All that plain torch reads is one."""
    found: dict[str, list[_Use]] = {}
    rest: dict[str, _Use] = {}
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
            kind = vocab if is_call(node, *_VOCAB) else rest
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
