"""A whole program -> a file: constants, a class a block, the model, and the class vLLM loads."""

from __future__ import annotations

import inspect

from compiler.emit.block import emit_block
from compiler.emit.body import BodyLines
from compiler.emit.compiled_for import compiled_for
from compiler.emit.helpers import helpers
from compiler.emit.loading import HELPERS, tensor_lines
from compiler.emit.scope import IMPORTS
from compiler.emit.served import ServedLines
from compiler.emit.text import WIDTH, table, wrapped
from compiler.partition import Partitioned
from funcmodels import __version__
from funcmodels.errors import LoweringError


def emit_model(program: Partitioned) -> str:
    """The source of a lowered program's vLLM class, as a file that stands alone.

    Raises:
        LoweringError: the text is not Python: a fault of the compiler, named as such.
    """
    text = _Writer(program).file()
    try:
        compile(text, f"{program.model.name}.py", "exec", dont_inherit=True)
    except SyntaxError as error:
        raise LoweringError(
            f"what is written for {program.model.name} is not Python",
            got=f"{error.msg}: {(error.text or '').strip()}",
            need="a file that can be imported",
            fix="this is a fault of the compiler: please report it with this message",
        ) from error
    return text


class _Writer(BodyLines, ServedLines):
    def file(self) -> str:
        blocks = [
            emit_block(self.module, block, self.plan.blocks[name])
            for name, block in self.program.blocks.items()
            if name in self.plan.blocks
        ]
        body, served = self.model_class(), self.served_class()
        tensors = tensor_lines(self.loading, self.module)
        first, last = self.helpers()
        header = [
            *self.docstring(),
            "",
            *self.imports(),
            "",
            *(f"{name} = {size}" for name, size in self.module.constants.items()),
            "",
            "# The config.json that this file was compiled for, as far as it decides the values.",
            *table("COMPILED_FOR", compiled_for(self.model)),
            "",
            *tensors,
        ]
        written = [[new for x in part for new in wrapped(x)] for part in (*blocks, body, served)]
        parts = [*written[:-1], *first, written[-1], *last]
        lines = [new for line in header for new in wrapped(line)]
        return "\n".join([*lines, *(x for part in parts for x in ["", "", *part])]) + "\n"

    def docstring(self) -> list[str]:
        function = inspect.unwrap(getattr(self.model.forward, "func", self.model.forward))
        file = inspect.getsourcefile(function) or "?"
        written = f"written by funcmodels {__version__} from {file.rsplit('/', 1)[-1]}"
        return [
            f'"""{self.model.name} for vLLM: {written}, do not edit.',
            "",
            f"{self.model.num_parameters:,} parameters. Needs torch and vLLM, and not funcmodels.",
            '"""',
        ]

    def imports(self) -> list[str]:
        by_source: dict[str, set[str]] = {}
        for name in self.module.used:
            by_source.setdefault(IMPORTS[name], set()).add(name)
        plain: list[list[str]] = [[], []]  # `import x` stands before `from x import y`
        names_from: list[list[str]] = [[], []]  # each for the standard library, and for others
        for source in sorted(by_source):
            names = sorted(by_source[source])
            others = source not in ("import", "collections.abc", "itertools", "math", "typing")
            if source == "import":
                plain[0] += [f"import {name}" for name in names]
            elif source == "":
                plain[1].append("import torch")
            elif "F" in names:
                plain[1].append("import torch.nn.functional as F")
            else:
                names_from[others] += _from(source, names)
        groups = [p + f for p, f in zip(plain, names_from, strict=True) if p or f]
        return [line for group in groups for line in ["", *group]][1:]

    def helpers(self) -> tuple[list[list[str]], list[list[str]]]:
        """The source of the runtime functions that the file uses: before its last class, after."""
        first = HELPERS
        rest = sorted(self.module.helpers - set(first))
        before, after = ([list(helpers()[name].lines) for name in part] for part in (first, rest))
        return before, after


def _from(source: str, names: list[str]) -> list[str]:
    """`from source import names`, on as many lines as it takes."""
    one = f"from {source} import {', '.join(names)}"
    if len(one) <= WIDTH:
        return [one]
    return [f"from {source} import (", *(f"    {n}," for n in names), ")"]
