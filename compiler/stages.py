"""Pipeline stages: where the body of a served model is cut, and which layers vLLM puts where."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from compiler.ir import Block
from compiler.modules import Placed
from compiler.roll import Loop, roll


@dataclass
class Root:
    """The statements of a model's body around its loop over layers."""

    before: list[fx.Node]
    loop: Loop | None
    after: list[fx.Node]


def root_of(body: Block, placed: Placed) -> Root:
    """The body in three, where one loop runs over its layers; else in one."""
    items = roll(body, placed)
    loops = [i for i, item in enumerate(items) if isinstance(item, Loop)]
    if len(loops) != 1:
        return Root([n for n in body.graph.nodes if n.op != "output"], None, [])
    at = loops[0]
    before = [n for n in items[:at] if isinstance(n, fx.Node)]
    after = [n for n in items[at + 1 :] if isinstance(n, fx.Node)]
    loop = items[at]
    assert isinstance(loop, Loop)
    return Root(before, loop, after)


def why_one_stage(body: Block, root: Root) -> str | None:
    """Why a model cannot be cut into pipeline stages, or None where it can.

    Stages are cut between layers, and send on what goes from layer to layer and nothing else.
    """
    loop = root.loop
    if loop is None:
        return "its layers are not one loop, each taking what the one before returns"
    _, positions = body.inputs
    before = set(root.before) - {positions}
    constants = [a for a in loop.pattern if isinstance(a, fx.Node)]
    for node in [*root.after, *loop.calls[:1]]:
        for used in node.all_input_nodes:
            first = node is loop.calls[0] and used in loop.initial
            if used in before and not first and used.op != "get_attr":
                return f"{used.name}, made before the layers, is used after them or in each"
    if not loop.results:
        return "its layers return nothing"
    if other := next((c for c in constants if c is not positions), None):
        return f"every layer reads {other.name} beside the positions"
    return None


def layers_of_stages(layers: int, stages: int) -> list[range]:
    """The layers of each stage, as vLLM cuts them.

    Equally many each; of what is left over, one more to each stage from the last but one
    backwards: the last stage has the unembedding to do, and the first the embedding.
    (`VLLM_PP_LAYER_PARTITION`, which sets the numbers by hand, is not looked at.)

    Source: `get_pp_indices` of vLLM 0.32, `vllm/distributed/utils.py`.
    """
    counts = [layers // stages] * stages
    for i in range(layers % stages):
        counts[stages - 2 - i] += 1
    ends = [sum(counts[: i + 1]) for i in range(stages)]
    return [range(end - n, end) for n, end in zip(counts, ends, strict=True)]
