"""A recurrence as source text: a layer that keeps its state, and methods that are its step."""

from __future__ import annotations

from typing import Any

from torch import fx

from compiler.emit.layers import Layer, builds, numbered_prefix
from compiler.emit.method import method
from compiler.emit.scope import Module, Scope
from compiler.emit.text import kwargs, literal, wrapped
from compiler.ir import MODEL_DTYPE, LocalSize
from compiler.needs import Exact
from compiler.partition import Partitioned
from compiler.placement import Shard
from compiler.recurrence import Recurrence, recurrence
from compiler.recurrent_kernels import KERNELS


@builds(recurrence)
def _recurrence(scope: Scope, node: fx.Node, attr: str) -> Layer:
    found: Recurrence = node.kwargs["recurrence"]  # type: ignore[assignment]
    xs: Any = node.args[0]
    params: Any = node.args[1]
    methods = {"step": found.step} | ({"chunked": found.chunked} if found.chunked else {})
    for name, block in methods.items():
        method(scope, f"{attr}_{name}", block, len(found.slots))
    state = [
        f"({_shape(scope, slot.shape, at)}, {_dtype(scope, slot.dtype)}, {literal(slot.init)})"
        for (_, slot), at in zip(found.slots, found.placements, strict=True)
    ]
    results = found.step.results[len(found.slots) :]
    outputs = [
        f"({_shape(scope, r.meta['type'].shape[1:], r.meta['placement'], 1)}, "
        f"{_dtype(scope, r.meta['type'].dtype)})"
        for r in results
    ]
    settings = {
        **{name: f"self.{attr}_{name}" for name in methods},
        "state": f"[{', '.join(state)}]",
        "results": f"[{', '.join(outputs)}]",
        "chunk": str(found.chunk) if found.chunked else None,
        "kernel": scope.module.help(KERNELS[found.kernel].helper) if found.kernel else None,
        "vllm_config": "vllm_config",
        "prefix": numbered_prefix(scope, attr),
    }
    given = [", ".join(scope.value(n) for n in nodes) for nodes in (xs, params)]
    one = "({},)" if len(results) == 1 else ""
    text = f"{{}}([{given[0]}], [{given[1]}])"
    return Layer(scope.module.help("Recurrent"), kwargs(settings), text, one)


def _shape(scope: Scope, shape: Any, at: Any, lead: int = 0) -> str:
    """A shape on one rank, `lead` dims of the placed value left out before it."""
    sizes = [str(n) for n in shape]
    if isinstance(at, Shard):
        dim = at.dim - lead
        sizes[dim] = scope.local_size(LocalSize(at.units, shape[dim] // at.units, at.axis, "tp"))
    return _tuple(sizes)


def _dtype(scope: Scope, dtype: Any) -> str:
    if dtype is MODEL_DTYPE:
        return "vllm_config.model_config.dtype"
    scope.module.use("torch")
    return literal(dtype)


def _tuple(items: list[str]) -> str:
    """The text of a tuple of expressions."""
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def state_lines(module: Module, program: Partitioned) -> list[str]:
    """The methods by which vLLM asks how large the states of a model's layers are."""
    kinds = {
        _kind(program, found)
        for block in program.all()
        if (found := [node for node in block.graph.nodes if node.target is recurrence])
    }
    if not kinds:
        return []
    for name in ("VllmConfig", "get_temporal_copy_spec", "torch"):
        module.use(name)
    rows = [
        line
        for shapes, dtypes in sorted(kinds)
        for line in wrapped(f"            ({shapes}, {dtypes}),")
    ]
    return [
        "",
        "    is_hybrid = True",
        "    has_inner_state = True",
        "",
        "    @classmethod",
        "    def recurrent_states(cls, vllm_config: VllmConfig) -> list:",
        '        """Shapes and dtypes of the states of each kind of module, on one rank."""',
        "        tp_size = vllm_config.parallel_config.tensor_parallel_size",
        "        return [",
        *rows,
        "        ]",
        "",
        "    @classmethod",
        "    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple:",
        f"        return {module.help('largest_state')}(cls.recurrent_states(vllm_config))[0]",
        "",
        "    @classmethod",
        "    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple:",
        "        return largest_state(cls.recurrent_states(vllm_config))[1]",
        "",
        "    @classmethod",
        "    def get_mamba_state_copy_funcs(cls, kinds: set) -> dict:",
        '        """How the engine copies a layer\'s states: as one tensor of bytes."""',
        "        return dict.fromkeys(kinds, (get_temporal_copy_spec,))",
    ]


def _kind(program: Partitioned, nodes: list[fx.Node]) -> tuple[str, str]:
    """The states of a block's recurrences, as text: they share a page of the engine's."""
    exact = Exact(program.needs)
    shapes, dtypes = [], []
    for node in nodes:
        found: Recurrence = node.kwargs["recurrence"]  # type: ignore[assignment]
        for (_, slot), at in zip(found.slots, found.placements, strict=True):
            sizes = [str(n) for n in slot.shape]
            if isinstance(at, Shard):
                assert exact.divides(at.axis, at.units)
                sizes[at.dim] = f"{slot.shape[at.dim]} // tp_size"
            shapes.append(_tuple(sizes))
            own = slot.dtype is MODEL_DTYPE
            dtypes.append("vllm_config.model_config.dtype" if own else str(slot.dtype))
    return _tuple(shapes), _tuple(dtypes)
