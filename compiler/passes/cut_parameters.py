"""Parameters of which every rank reads its own block only -> cut, when they are loaded."""

from __future__ import annotations

from compiler import collectives
from compiler.ir import Block
from compiler.placement import Replicate
from compiler.rewrite import calls_of, is_param, replace_with


def cut_parameters(block: Block) -> Block:
    """Hold a rank's block of a parameter where nothing of the rest is read.

        w = p.q_norm; h = rms_norm_over_ranks(q, take_block(w, 0, 32, "tp"), "tp")
    ->
        w = p.q_norm, cut into 32 blocks; h = rms_norm_over_ranks(q, w, "tp")
    """
    for block_of in calls_of(block, collectives.take_block):
        param = block_of.args[0]
        if not is_param(param) or not isinstance(param.meta["placement"], Replicate):  # type: ignore[union-attr]
            continue
        users = list(param.users)  # type: ignore[union-attr]
        at = block_of.meta["placement"]
        if all(u.target is collectives.take_block and u.meta["placement"] == at for u in users):
            param.meta["placement"] = at  # type: ignore[union-attr]
            for user in users:
                replace_with(block, user, param)  # type: ignore[arg-type]
    return block
