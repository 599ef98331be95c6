"""What emitted files carry along as text, with the names that each function or class needs."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

FILES = (
    "vllm_runtime.py", "vllm_fast.py", "vllm_checks.py", "vllm_names.py", "vllm_weights.py",
    "vllm_stages.py", "vllm_ranks.py", "vllm_recurrent.py", "vllm_recurrent_batch.py",
    "vllm_recurrent_kernels.py",
)  # fmt: skip


@dataclass(frozen=True)
class Helper:
    """A function or class that emitted files carry along.

    Args:
        lines: its source.
        node: the same, parsed.
    """

    lines: tuple[str, ...]
    node: ast.AST

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """What it reads that is not its own: imports, and other helpers."""
        return frozenset(n.id for n in ast.walk(self.node) if isinstance(n, ast.Name))


@functools.cache
def helpers() -> dict[str, Helper]:
    """All of them, by name. Read and not imported: compiling needs no vLLM."""
    return {name: found for file in FILES for name, found in _defined_in(file).items()}


def _defined_in(file: str) -> dict[str, Helper]:
    source = (Path(__file__).parent.parent / file).read_text()
    lines = source.split("\n")
    return {
        node.name: Helper(tuple(lines[_first(node) - 1 : node.end_lineno]), node)
        for node in ast.parse(source).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


def _first(node: ast.FunctionDef | ast.ClassDef) -> int:
    """The line where a definition begins, decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
