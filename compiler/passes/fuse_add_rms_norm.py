"""A residual addition and the norm after it -> one layer, within blocks and across them."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from compiler import layers
from compiler.ir import Block, Program, TensorType, add_node, tensor_type
from compiler.rewrite import (
    calls_of,
    copy_block,
    dce,
    insert,
    is_call,
    is_param,
    only_user,
    replace_with,
)
from funcmodels import ops

# Results of these share memory with their operand, which the fused layer would overwrite.
_VIEWS = (torch.reshape, torch.transpose, torch.permute, torch.unsqueeze, torch.squeeze)


def fuse_add_rms_norm(program: Program) -> Program:
    """Let each norm take the residual addition before it, as vLLM's models do.

        def layer(x):      x1 = x + attn(norm(x));  return x1 + mlp(norm2(x1))
    ->
        def layer(x, residual):
            h, residual = add_norm(x, residual);  h, residual = add_norm2(attn(h), residual)
            return mlp(h), residual

    An addition at the end of a block is left to the block that follows, when that one starts with
    a norm: the block returns both terms. The fused layer overwrites its operands, so it is used
    only where nothing reads them afterwards.
    """
    blocks = {name: copy_block(block) for name, block in program.blocks.items()}
    new = replace(program, root=copy_block(program.root), blocks=blocks)
    in_pairs = any("optional" in n.meta for block in blocks.values() for n in block.inputs)
    if not in_pairs and any(_ends_in_add(new, block) for block in blocks.values()):
        takes = {name: _starts_with_norm(new, block) for name, block in blocks.items()}
        for block in blocks.values():
            for name in takes[block.name]:
                _take_pair(block, name)
        defers = _deferring(new, takes)
        for block in (*blocks.values(), new.root):
            for call in block.calls:
                _give_pairs(new, block, call, takes, defers)
            if block.name in defers and block is not new.root:
                _return_pair(block)
    for block in (*blocks.values(), new.root):
        for node in calls_of(block, ops.rms_norm):
            _fuse(block, node)
        dce(block)
    return new


# What blocks can take and give


def _starts_with_norm(program: Program, block: Block) -> list[str]:
    """Inputs whose first use is a norm, here or in a block that they are handed to."""
    return [node.name for node in block.inputs if _normed_first(program, node)]


def _normed_first(program: Program, value: fx.Node) -> bool:
    users = sorted(value.users)
    if not users or len(tensor_type(value).shape) != 2:
        return False
    first = users[0]
    if is_call(first, ops.rms_norm):
        return first.args[0] is value and is_param(first.args[1])
    if first.op != "call_module" or len(users) > 1 or first.args.count(value) > 1:
        return False
    callee = program.blocks[str(first.target)]
    return _normed_first(program, callee.inputs[first.args.index(value)])


def _ends_in_add(program: Program, block: Block) -> bool:
    """Whether a block's one result is a sum made at its end, here or in a block it calls."""
    if len(block.results) != 1:
        return False
    (result,) = block.results
    if only_user(result) is not block.output:
        return False
    if result.op == "call_module":
        return _ends_in_add(program, program.blocks[str(result.target)])
    return is_call(result, torch.add) and _is_plain_add(result)


def _deferring(program: Program, takes: dict[str, list[str]]) -> set[str]:
    """The blocks that leave their last addition to others, all of whom have a norm for it."""
    found = {name for name, block in program.blocks.items() if _ends_in_add(program, block)}
    while True:
        unwanted = {
            str(call.target)
            for block in program.all()
            for call in block.calls
            if not any(_wants_pair(program, block, call, user, takes, found) for user in call.users)
        }

        kept = {
            name
            for name in found - unwanted
            for (result,) in [program.blocks[name].results]
            if result.op != "call_module" or str(result.target) in found
        }
        if kept == found:
            return found
        found = kept


def _wants_pair(
    program: Program,
    block: Block,
    call: fx.Node,
    user: fx.Node,
    takes: dict[str, list[str]],
    found: set[str],
) -> bool:
    """Whether a user of a call's result would rather have the two terms of it."""
    if user.op == "output":
        return block.name in found and block is not program.root
    if user.op == "call_module":
        names = takes[str(user.target)]
        inputs = [n for n in program.blocks[str(user.target)].inputs if "optional" not in n.meta]
        return any(a is call and n.name in names for a, n in zip(user.args, inputs, strict=True))
    return is_call(user, ops.rms_norm) and user.args[0] is call and is_param(user.args[1])


def _is_plain_add(node: fx.Node) -> bool:
    """Whether a node adds two (num_tokens, features) tensors of one type, each once."""
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    return (
        len(operands) == 2
        and not node.kwargs
        and operands[0] is not operands[1]
        and len(tensor_type(node).shape) == 2
        and all(tensor_type(a) == tensor_type(node) for a in operands)
        and all(a.op != "get_attr" for a in operands)
    )


# Rewriting


def _take_pair(block: Block, name: str) -> None:
    """Let an input come as two terms; their sum is made where the input was used."""
    x = next(n for n in block.inputs if n.name == name)
    users = list(x.users)
    with block.graph.inserting_after(x):
        residual = block.graph.placeholder("residual")
    residual.meta = {**x.meta, "optional": True}
    last = block.inputs[-1]
    with block.graph.inserting_after(last):
        total = block.graph.call_function(torch.add, (x, residual))
    total.meta = {**x.meta, "pair": True}
    for user in users:
        user.replace_input_with(x, total)


def _return_pair(block: Block) -> None:
    """Return the two terms of the sum at the end of a block."""
    (result,) = block.results
    assert is_call(result, torch.add)
    x, residual = _terms(result)
    block.graph.erase_node(block.output)
    block.graph.output((x, residual))
    block.graph.erase_node(result)


def _terms(total: fx.Node) -> tuple[fx.Node, fx.Node]:
    """A sum's new term and its residual: the one that was there first, or that came as such."""
    a, b = (n for n in total.args if isinstance(n, fx.Node))
    if "pair" in total.meta:
        return a, b
    return (b, a) if a <= b else (a, b)


def _give_pairs(
    program: Program, block: Block, call: fx.Node, takes: dict[str, list[str]], defers: set[str]
) -> None:
    """Adapt a call to a callee that takes or returns pairs."""
    callee = program.blocks[str(call.target)]
    args: list[Any] = []
    given = iter(call.args)
    for placeholder in callee.inputs:
        if "optional" in placeholder.meta:
            continue
        value = next(given)
        assert isinstance(value, fx.Node)
        if placeholder.name not in takes[callee.name]:
            args.append(value)
        elif is_call(value, torch.add) and only_user(value) is call and _is_plain_add(value):
            args += _terms(value)
        elif only_user(value) is call and value.op != "get_attr":
            args += [value, None]
        else:  # the fused layer overwrites what it is given, and others still need this
            args += [insert(block, call, torch.clone, (value,), like=value), None]
    call.args = tuple(args)
    if callee.name in defers:
        _take_results(block, call)


def _take_results(block: Block, call: fx.Node) -> None:
    """Let a call's result be the sum of the two terms that it now returns."""
    one = call.meta["type"]
    assert isinstance(one, TensorType)
    users = list(call.users)
    meta = dict(call.meta)
    at = meta.get("placement")
    call.meta.update(type=(one, one), placement=(at, at))
    meta.pop("binding")
    parts = []
    after = call
    for i, name in enumerate(("hidden_states", "residual")):
        with block.graph.inserting_after(after):
            after = add_node(block.graph, "call_function", operator.getitem, (call, i), {}, name)
        after.meta = dict(meta)
        parts.append(after)
    with block.graph.inserting_after(after):
        total = add_node(block.graph, "call_function", torch.add, tuple(parts), {})
    total.meta = {**meta, "pair": True}
    for user in users:
        user.replace_input_with(call, total)


def _fuse(block: Block, norm: fx.Node) -> None:
    """One norm of a sum as the fused layer, where nothing reads the sum's terms later."""
    total, weight = norm.args[0], norm.args[1]
    if not is_call(total, torch.add) or not _is_plain_add(total) or not is_param(weight):  # type: ignore[arg-type]
        return
    assert isinstance(total, fx.Node) and isinstance(weight, fx.Node)
    x, residual = _terms(total)
    for operand in (x, residual):
        if operand.target in _VIEWS or any(u > total for u in operand.users):
            return
    if weight > total:
        total.prepend(weight)
    kind, at = tensor_type(total), total.meta["placement"]
    both = insert(
        block,
        total,
        layers.add_rms_norm,
        (x, residual, weight),
        dict(norm.kwargs),
        type=(kind, kind),
        placement=(at, at),
        like=norm,
        name="add_norm",
    )
    normed = insert(
        block,
        total,
        operator.getitem,
        (both, 0),
        type=kind,
        placement=at,
        like=norm,
        name=norm.name,
    )
    added = insert(
        block, total, operator.getitem, (both, 1), type=kind, placement=at, name="residual"
    )
    replace_with(block, norm, normed)
    replace_with(block, total, added)
