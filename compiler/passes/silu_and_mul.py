"""silu(a) * b and gelu(a) * b -> the gated unit."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compiler.ir import Block
from compiler.rewrite import calls_of, insert, is_call, only_user, replace_with
from funcmodels import ops


def silu_and_mul(block: Block) -> Block:
    """Write the product of an activation and a gate as `ops.swiglu` or `ops.geglu`.

        a = silu(gate); y = a * up
    ->
        y = swiglu(gate, up)
    """
    for node in calls_of(block, torch.mul):
        for act, up in (node.args[:2], node.args[1::-1]):
            if not is_call(act, F.silu, F.gelu) or only_user(act) is not node:  # type: ignore[arg-type]
                continue
            if not hasattr(up, "meta") or act.meta["type"] != up.meta["type"]:  # type: ignore[union-attr]
                continue
            gate = act.args[0]  # type: ignore[union-attr]
            if is_call(act, F.silu):
                new = insert(block, node, ops.swiglu, (gate, up))
            else:
                approximate = act.kwargs.get("approximate", "none")  # type: ignore[union-attr]
                new = insert(block, node, ops.geglu, (gate, up), {"approximate": approximate})
            replace_with(block, node, new)
            break
    return block
