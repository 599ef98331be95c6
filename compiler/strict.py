"""`strict=`: refuse what is right but slow, except where the user has allowed it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeAlias

from compiler import collectives
from compiler.ir import Program, target_name
from compiler.why import is_product, why_plain_product
from funcmodels.errors import LoweringError
from funcmodels.source import SourceLine


@dataclass(frozen=True)
class Allowed:
    """Strict, but for some places; `fm.allow` makes it."""

    places: tuple[str, ...]


Strict: TypeAlias = bool | Allowed


def allow(*places: str) -> Allowed:
    """Strict but for some places: `fm.compile_to_vllm(model, strict=fm.allow("route"))`.

    Args:
        places: names of functions, or lines as `fm.explain` names them, "my_model.py:31". A place
            that is not there allows nothing.
    """
    return Allowed(places)


def refuses(strict: Strict, where: SourceLine) -> bool:
    """Whether a line may not gather, or multiply with a parameter in plain torch."""
    if isinstance(strict, bool):
        return strict
    line = f"{os.path.basename(where.file)}:{where.line}"
    return not {where.function, line}.intersection(strict.places)


def ways_out(where: SourceLine) -> str:
    """How to allow a line, for the end of a fix."""
    return f'strict=fm.allow("{where.function}"), or anywhere: strict=False'


def check_strict(program: Program, strict: Strict) -> None:
    """Refuse gathers, and products with parameters that no layer of vLLM's does.

    Args:
        program: lowered.
    Raises:
        LoweringError: names the operation, the user's line and why no layer does it.
    """
    for block in program.all() if strict else ():
        for node in block.graph.nodes:
            if node.op != "call_function" or not refuses(strict, node.meta["where"]):
                continue
            where = node.meta["where"]
            if node.target is collectives.all_gather:
                user = next(iter(node.users))
                name = "the result" if user.op == "output" else target_name(user.target)
                raise LoweringError(
                    f"{name} needs the whole of a value that is cut over the ranks",
                    got=f"{node.args[0]}: {node.meta['type']}, gathered on every rank",
                    need="values that stay cut, with strict",
                    from_=where,
                    fix=f"shard its axis differently, or allow gathering here: {ways_out(where)}",
                )
            if is_product(node):
                raise LoweringError(
                    f"{target_name(node.target)} with a parameter is left to plain torch",
                    got=why_plain_product(node),
                    need="products that vLLM's layers do, with strict: others are neither "
                    "quantised nor adapted",
                    from_=where,
                    fix="one product of an activation and one parameter, or allow it here: "
                    + ways_out(where),
                )
