"""A vocabulary that is divided over ranks -> the engine's embedding and output layers."""

from __future__ import annotations

from torch import fx

from compiler import collectives, layers
from compiler.ir import Block
from compiler.placement import REPLICATE, Shard
from compiler.rewrite import calls_of, insert, is_call, is_param, only_user, replace_with
from compiler.rules import vocab_embed
from funcmodels import ops


def lower_vocab(block: Block) -> Block:
    """Take collectives into the embedding and the unembedding.

        x = vocab_embed(tokens, p.embed); y = all_reduce(x)
    ->  y = vocab_embedding(tokens, p.embed)

        l = unembed(x, p.head); m = all_gather(l, 1)
    ->  m = logits(x, p.head)

    The engine's layers pad a vocabulary that does not divide.
    """
    for node in calls_of(block, vocab_embed):
        reduced = only_user(node)
        if is_call(reduced, collectives.all_reduce) and is_param(node.args[1]):
            assert reduced is not None
            new = insert(block, reduced, layers.vocab_embedding, node.args)
            replace_with(block, reduced, new)
    for node in calls_of(block, ops.unembed):
        x, table = node.args
        gathered = only_user(node)
        if not is_param(table) or table.meta["placement"] != _by_rows(table):  # type: ignore[union-attr]
            continue
        if is_call(gathered, collectives.all_gather):
            assert gathered is not None
            new = insert(
                block, gathered, layers.logits, (x, table, gathered.args[-1]), placement=REPLICATE
            )
            replace_with(block, gathered, new)
    return block


def _by_rows(table: fx.Node) -> Shard | None:
    at = table.meta["placement"]
    return at if isinstance(at, Shard) and at.dim == 0 else None
