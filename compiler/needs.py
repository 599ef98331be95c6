"""What a served model's axes ask of the number of tensor-parallel ranks."""

from __future__ import annotations

from compiler import layers
from compiler.partition import Need, Partitioned
from compiler.placement import Shard

# Layers that pad the axis they cut, so that any number of ranks divides it.
_PADDED = (layers.vocab_embedding, layers.logits)


def served_needs(program: Partitioned) -> list[Need]:
    """The demands on tp of a served model: those of its vocabulary go, since vLLM pads it."""
    cut: dict[str, bool] = {}
    for block in program.all():
        for node in block.graph.nodes:
            at = node.meta.get("placement")
            if node.op == "get_attr" and isinstance(at, Shard):
                padded = all(user.target in _PADDED for user in node.users)
                cut[at.axis] = cut.get(at.axis, True) and padded
    return [need for need in program.needs if not cut.get(need.axis, False)]
