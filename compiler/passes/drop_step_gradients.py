"""The step of a recurrence, served: what it does for gradients alone is dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiler.associative import on_combine
from compiler.ir import Block
from compiler.passes.drop_gradients import drop_gradients
from compiler.recurrence import Recurrence, recurrence
from compiler.rewrite import calls_of, copy_block


def drop_step_gradients(block: Block) -> Block:
    """`drop_gradients` in the step and the chunked form of each recurrence of a block."""
    for node in calls_of(block, recurrence):
        found: Recurrence = node.kwargs["recurrence"]  # type: ignore[assignment]
        step, chunked = (inner and _dropped(inner) for inner in (found.step, found.chunked))
        assert step is not None
        made: Any = replace(found, step=step, chunked=chunked)
        node.kwargs = {**node.kwargs, "recurrence": made}
    return block


def _dropped(block: Block) -> Block:
    return on_combine(drop_gradients(copy_block(block)), _dropped)
