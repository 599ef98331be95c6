"""What runs within a module and is none itself: a method of its class."""

from __future__ import annotations

from typing import Any

from torch import fx

from compiler.associative import associative
from compiler.emit.block import statements
from compiler.emit.expressions import special
from compiler.emit.scope import Scope
from compiler.emit.text import call
from compiler.ir import Block
from compiler.modules import Placed
from compiler.rewrite import calls_of


def method(scope: Scope, name: str, block: Block, of_tokens: int = 0) -> None:
    """A block as a method of a class: it may read the class's local sizes.

    Args:
        of_tokens: which of its inputs has the number of tokens as its first dim.
    """
    inner = Scope(scope.module, block, Placed(), scope.local, methods=scope.methods, method=name)
    inputs = [inner.bind(node) for node in block.inputs]
    body = statements(inner, [n for n in block.graph.nodes if n.op != "output"], 8)
    results = ", ".join(inner.value(r) for r in block.results)
    scope.needs_dtype |= inner.needs_dtype
    scope.module.use("torch")
    count = [f"        num_tokens = {inputs[of_tokens]}.shape[0]"] if inner.symbols else []
    arguments = ["self", *(f"{n}: torch.Tensor" for n in inputs)]
    scope.methods[name] = [
        *call(f"def {name}", arguments, 4, " -> tuple[torch.Tensor, ...]:"),
        *count,
        *body,
        f"        return {results}{',' if len(block.results) == 1 else ''}",
    ]


@special(associative)
def _associative(scope: Scope, node: fx.Node) -> str:
    """A scan, by a further method of the class."""
    xs: Any = node.args[0]
    found: Any = node.kwargs["combine"]
    i = calls_of(scope.block, associative).index(node)
    name = f"{scope.method}_combine{i + 1 if i else ''}"
    method(scope, name, found.block)
    given = ", ".join(scope.value(x) for x in xs)
    helper = scope.module.help("associative_scan")
    one = "[0]" if len(xs) == 1 else ""
    return f"{helper}(self.{name}, [{given}], {node.kwargs['dim']}){one}"
