"""Write docs/design/001-compiler.md: one attention block, at every stage of the compiler.

    python -m tools.design_page          # write the page
    python -m tools.design_page --check  # end with 1 if the page is not what would be written

The stages are printed from the compiler's own graphs, so the page cannot say what is not so.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx

from compiler.emit import emit_model
from compiler.ir import Block, target_name
from compiler.partition import partition
from compiler.passes import run_passes
from compiler.passes.outline_layers import outline_layers
from compiler.placement import Shard
from compiler.trace import trace
from examples import hello

PAGE = Path(__file__).parent.parent / "docs" / "design" / "001-compiler.md"
RANKS = 2

TEXT = """# 001. How the compiler works, on one attention block

*Written by `python -m tools.design_page`, and checked by the tests. Do not edit.*

The compiler takes a pure function over declared parameters and returns the source of a vLLM class.
Five stages, five pictures of the same block. The model is
[`examples/hello.py`](../../examples/hello.py): two layers, four heads of 32, hidden size 64.

## 1. As written

```python
{written}```

No parallelism, no cache, no vLLM. The whole shapes, on one device. All that is said about
parallelism is one table: `{sharding}`.

## 2. Traced

`compiler/trace.py` runs the function once, on fake tensors that hold no data and have a symbolic
number of tokens, and writes down every torch function and every op of `funcmodels.ops` that it
calls. The result is a `torch.fx.Graph`, one for each distinct block: the second layer calls the
same block with other parameters, and is not traced again: depth costs next to nothing.

```
{traced}```

On the right: dtype and global shape. `model` is whatever dtype the weights will have
([005](005-model-dtype.md)). Indices of `einsum` are renamed in their order, so that equal products
look equal. Every node remembers the line of the user that made it, and errors name that line.

## 3. Partitioned

`compiler/partition.py` walks the graph once. The table says how parameters are cut; one rule for
each function says how its result then lies (`compiler/rules/`), and where that is not what the
next function needs, a collective is put between. The result is one program that every rank runs,
for any number of ranks. With two, one of them holds these shapes:

```
{partitioned}```

`shard(0, heads)` is cut along dim 0, by whole heads. Each rank computes its own heads from start to
end. The last product sums over heads, so each rank has a part of the sum, `partial`; the residual
needs all of it, hence the `all_reduce`, the only communication here. `vary` does nothing in this
direction: backwards it sums the gradients, which is what makes the same program right for training
(`compile_to_torch`). Every rule is tested by running such programs on simulated ranks and comparing
with the whole function.

Dividing heads makes demands, such as that the ranks divide their number. They are collected here:
`fm.check(model, tp=3)` answers with them in hand, without a GPU and before anything is loaded.

## 4. After the passes

`compiler/passes/` replaces plain operations by vLLM's layers, one small file a rewrite, each
checked by evaluating the program before and after. Still two ranks:

```
{lowered}```

What happened, in order: the gradient-only `vary` is gone; each product became a linear layer, cut
by columns or by rows; the last product and the `all_reduce` became one row-parallel linear; q, k
and v read the same input, so they are one `qkv` linear, split afterwards; heads stay flat, which is
the form the engine's kernels want; and the residual addition moved into a norm. That last one
reaches across blocks: the block returns both terms of its final sum, and the norm that opens the
next block adds them up ([003](003-residuals-across-blocks.md)).

## 5. Emitted

`compiler/emit/` writes the graph as Python. Sizes become names, local sizes are divided by the
ranks, layers get the prefixes that quantisation and adapters look for
([002](002-module-tree.md)). Beside the blocks, the file holds the model's body with its layers and
pipeline stages, and the class that vLLM loads, with its weight loading.

```python
{emitted}```

That file is all that vLLM's workers are given ([004](004-workers-get-a-file.md)). Read the whole of
it with `python -m funcmodels emit examples/hello.py:model`.
"""


def page() -> str:
    """The text of the page."""
    traced = trace(hello.model)
    partitioned = partition(outline_layers(traced), "tp")
    lowered: Any = run_passes(partitioned)
    return TEXT.format(
        written=inspect.getsource(hello.attention),
        sharding=hello.model.sharding,
        traced=listing(traced.blocks["attention"]),
        partitioned=listing(partitioned.blocks["attention"]),
        lowered=listing(lowered.blocks["attention"]),
        emitted=class_of(emit_model(lowered), "HelloAttention"),
    )


def listing(block: Block) -> str:
    """A graph as text, one aligned line a node: what it is, then its type and placement."""
    rows = []
    for node in block.graph.nodes:
        if node.op == "output":
            results = ", ".join(_argument(result) for result in node.args[0])
            rows.append((f"return {results}", ""))
        elif node.op != "get_attr":
            rows.append((f"{node.name} = {_call(node)}", _type(node)))
    parameters = [(f"p.{n.target}", _type(n)) for n in block.graph.nodes if n.op == "get_attr"]
    rows = parameters + rows
    width = min(68, max(len(left) for left, right in rows if right))
    lines = []
    for left, right in rows:
        if right and len(left) > width:
            lines.append(left)
            left = ""
        lines.append(f"{left:<{width}}  {right}".rstrip())
    return "\n".join(lines) + "\n"


def _call(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if target_name(node.target) == "getitem":
        return f"{_argument(node.args[0])}[{node.args[1]}]"
    arguments = [_argument(a) for a in node.args]
    arguments += [f"{k}={_argument(v)}" for k, v in node.kwargs.items() if k != "matrices"]
    return f"{target_name(node.target)}({', '.join(arguments)})"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"p.{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(_argument, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return repr(value)


def _type(node: fx.Node) -> str:
    type_, place = node.meta["type"], node.meta.get("placement")
    if isinstance(type_, (tuple, list)):
        return ""  # its parts follow, each on a line of its own
    if isinstance(place, Shard):
        local = list(type_.shape)
        local[place.dim] //= RANKS
        type_ = replace(type_, shape=tuple(local))
    return f"{type_}" + (f"  {place}" if place is not None else "")


def class_of(source: str, name: str) -> str:
    """One class of an emitted file."""
    found = re.search(rf"^class {name}\b.*?(?=\n\n\n)", source, re.MULTILINE | re.DOTALL)
    assert found, f"no class {name} in the emitted source"
    return found[0] + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page() and f"{PAGE} is old: python -m tools.design_page")
    PAGE.write_text(page())
    print(PAGE)
