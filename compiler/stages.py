"""Pipeline stages: where the body of a served model is cut, and which layers vLLM puts where."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass

from torch import fx

from compiler.ir import Block, binding
from compiler.modules import Placed
from compiler.rewrite import is_call
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
        return _why_no_loop(body)
    _, positions = body.inputs
    before = set(root.before) - {positions}
    for node in [*root.after, *loop.calls[:1]]:
        for used in node.all_input_nodes:
            first = node is loop.calls[0] and used in loop.initial
            if used in before and not first and used.op != "get_attr":
                where = used.meta.get("where")
                return f"what is made at {where}, before the layers, is used in each or after them"
    if not loop.results:
        return "its layers return nothing"
    if other := next((c for c in loop.constants if c is not positions), None):
        return f"every layer reads what is made at {other.meta.get('where')}"
    return None


def _why_no_loop(body: Block) -> str:
    """Why the calls of a model's layers are not one loop."""
    lists: dict[str, list[fx.Node]] = {}
    for call in body.calls:
        indexed = (path.split(".") for path in binding(call).values())
        names = {f"{name}.{rest[0]}" for name, *rest in indexed if rest and rest[0].isdigit()}
        for name in names if len(names) == 1 else ():
            lists.setdefault(name.partition(".")[0], []).append(call)
    if not lists:
        return "it has no list of layers"
    if len(lists) > 1:
        return f"its layers are in several lists: {', '.join(lists)}"
    ((name, calls),) = lists.items()
    for i, (call, after) in enumerate(itertools.pairwise(calls)):
        values = [call, *(user for user in call.users if is_call(user, operator.getitem))]
        users = {user for value in values for user in value.users} - {*values, after}
        if users:
            where = min((user.meta.get("where") for user in users), key=str)
            return f"what {name}.{i} returns is used at {where}, and not by {name}.{i + 1} alone"
    return f"the calls of {name} are not one loop, each taking what the one before returns"


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
