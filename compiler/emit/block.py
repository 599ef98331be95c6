"""One block -> one `nn.Module` class, and the statements of any graph."""

from __future__ import annotations

import ast
import operator

from torch import fx

from compiler.emit import expressions
from compiler.emit.computed import Computed
from compiler.emit.layers import BUILDERS
from compiler.emit.scope import Module, Scope
from compiler.emit.text import call
from compiler.ir import MODEL_DTYPE, Block, LocalSize, TensorType, tensor_type
from compiler.modules import Placed, is_given
from compiler.placement import Placement, Shard
from compiler.rewrite import is_call
from funcmodels.spec import Param


def emit_block(module: Module, block: Block, placed: Placed) -> list[str]:
    """The class of a block that is called by others."""
    scope = Scope(module, block, placed)
    inputs = [scope.bind(node) for node in block.inputs]
    body = statements(scope, [n for n in block.graph.nodes if n.op != "output"], 8)
    results = ", ".join(scope.value(r) for r in block.results)
    types = [
        "torch.Tensor | None" if "optional" in n.meta else "torch.Tensor" for n in block.inputs
    ]
    arguments = ["self", *(f"{n}: {t}" for n, t in zip(inputs, types, strict=True))]
    count = len(block.results)
    returns = "torch.Tensor" if count == 1 else f"tuple[{', '.join(['torch.Tensor'] * count)}]"
    for name in ("torch", "nn", "VllmConfig"):
        module.use(name)
    return [
        f"class {module.class_name(block.name)}(nn.Module):",
        "    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:",
        "        super().__init__()",
        *constructor(scope),
        "",
        *call("def forward", arguments, 4, f" -> {returns}:"),
        *symbol_lines(scope),
        *body,
        f"        return {results}",
        *method_lines(scope),
    ]


def method_lines(scope: Scope) -> list[str]:
    """The further methods of a class, which its layers call."""
    return [line for method in scope.methods.values() for line in ["", *method]]


def constructor(scope: Scope) -> list[str]:
    """The lines of `__init__` that make a block's layers, after its statements were written."""
    lines: list[str] = []
    module = scope.module
    made: list[str] = []
    checks: dict[str, None] = {}
    for node, attr in scope.placed.layers.items():
        layer = BUILDERS[node.target](scope, node, attr)
        made += parents(attr, made)
        made += call(f"self.{attr} = {layer.constructor}", layer.arguments, 8)
        checks.update(dict.fromkeys(layer.checks))
    bare = [line for name, attr in scope.placed.bare.items() for line in _bare(scope, name, attr)]
    for node, attr in scope.placed.calls.items():
        if not _in_list(attr):
            name = module.class_name(str(node.target))
            made += parents(attr, made)
            made += call(
                f"self.{attr} = {name}", ["vllm_config", f'prefix=f"{{prefix}}.{attr}"'], 8
            )
    lines += [f"        {check}" for check in checks]
    if scope.local:
        module.use("get_tensor_model_parallel_world_size")
        lines.append("        tp_size = get_tensor_model_parallel_world_size()")
        for name, (axis, units) in scope.local.items():
            whole = f"{module.size(axis, units)} // tp_size"
            if not module.exact.divides(axis, units):
                whole = f"max(1, {whole})"
            lines.append(f"        self.{name} = {whole}")
    if scope.needs_dtype:
        lines.append("        self.dtype = vllm_config.model_config.dtype")
    return lines + bare + made


def _in_list(attr: str) -> bool:
    return attr.rpartition(".")[2].isdigit()


def parents(attr: str, made: list[str]) -> list[str]:
    """`self.self_attn = nn.Module()` for a layer below a module that no block of its own makes."""
    parts = attr.split(".")[:-1]
    lines = [f"        self.{'.'.join(parts[: i + 1])} = nn.Module()" for i in range(len(parts))]
    return [line for line in lines if line not in made]


def _bare(scope: Scope, name: str, attr: str) -> list[str]:
    """A parameter that plain torch reads, or what is computed of it."""
    param = scope.block.params[name]
    node = next(n for n in scope.block.graph.nodes if n.op == "get_attr" and n.target == name)
    at = node.meta["placement"]
    for used in ("torch", "nn"):
        scope.module.use(used)
    computed = scope.computed.get(name)
    kept = node if computed is None else computed.value
    cut, shape, dtype = kept.meta["placement"], _whole_shape(kept), param.dtype
    sizes = [str(n) for n in shape]
    if shape == param.shape:
        sizes = [scope.module.size(a, n) for a, n in zip(param.axes, shape, strict=True)]
    if isinstance(cut, Shard):
        inner = shape[cut.dim] // cut.units
        sizes[cut.dim] = scope.local_size(LocalSize(cut.units, inner, cut.axis, "tp"))
    loader = None
    if computed is not None:
        own = tensor_type(kept).dtype
        dtype = None if own == MODEL_DTYPE else own
        loader = _computed_loader(scope, computed, param, at)
    elif isinstance(at, Shard):
        if scope.module.exact.divides(at.axis, at.units):
            loader = f"{scope.module.use('sharded_weight_loader')}({at.dim})"
        else:  # one block may lie on several ranks
            loader = f"{scope.module.help('own_block_loader')}({at.dim}, {at.units})"
    typed = [] if dtype is None else [f"dtype={dtype}"]
    empty = f"torch.empty({', '.join([*sizes, *typed]) or '()'})"
    lines = [f"        self.{attr} = nn.Parameter({empty}, requires_grad=False)"]
    if loader is not None:
        lines.append(
            f"        {scope.module.use('set_weight_attrs')}(self.{attr}, "
            f'{{"weight_loader": {loader}}})'
        )
    return lines


def _whole_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a value that has no size known only when running."""
    shape = tensor_type(node).shape
    assert all(isinstance(n, int) for n in shape), f"{node} has tokens"
    return tuple(int(n) for n in shape)  # type: ignore[arg-type]


def _computed_loader(scope: Scope, computed: Computed, param: Param, at: Placement) -> str:
    """What loads a parameter of which only what is computed of it is kept."""
    inner = Scope(scope.module, scope.block, Placed(), local=scope.local)
    text = inner.names[computed.param] = "x"
    for node in computed.chain:
        if node in computed.operations:
            is_atom = isinstance(ast.parse(text, mode="eval").body, (ast.Call, ast.Name))
            x = text if is_atom else f"({text})"
            inner.names |= dict.fromkeys(node.all_input_nodes, x)
            text = expressions.expression(inner, node)
        inner.names[node] = text
    arguments = [f"lambda x: {text}"]
    scope.needs_dtype |= param.dtype is None
    arguments.append("self.dtype" if param.dtype is None else str(param.dtype))
    if isinstance(at, Shard):
        arguments += [f"dim={at.dim}", f"units={scope.module.size(at.axis, at.units)}"]
    return f"{scope.module.help('computed_loader')}({', '.join(arguments)})"


def symbol_lines(scope: Scope, source: fx.Node | None = None) -> list[str]:
    """`num_tokens = x.shape[0]`, where a statement needs it; of the first input, if not given."""
    if not scope.symbols:
        return []
    source = source or next(n for n in scope.block.inputs if tensor_type(n).shape)
    return [f"        num_tokens = {scope.names[source]}.shape[0]"]


def statements(scope: Scope, nodes: list[fx.Node], indent: int) -> list[str]:
    """The lines that compute some nodes, in order."""
    lines: list[str] = []
    for node in nodes:
        if node.op in ("placeholder", "get_attr") or is_part(node) or node in scope.loaded:
            continue
        lines += statement(scope, node, indent)
    return lines


def is_part(node: fx.Node) -> bool:
    """Whether a node takes a tuple apart: that is part of the statement that makes the tuple."""
    if not is_call(node, operator.getitem):
        return False
    return not isinstance(node.args[0].meta["type"], TensorType)  # type: ignore[union-attr]


def statement(scope: Scope, node: fx.Node, indent: int) -> list[str]:
    """The lines of one node."""
    pad = " " * indent
    if node.op == "call_module":
        attr = scope.placed.calls[node]
        args = [scope.value(a) for a in node.args]
        container, _, last = attr.rpartition(".")
        callee = f"{container}[{last}]" if last.isdigit() else attr
        return call(f"{_targets(scope, node)} = self.{callee}", args, indent)
    attr = scope.placed.layers.get(node)
    if attr is None:
        text = expressions.expression(scope, node)
        return [f"{pad}{_targets(scope, node)} = {text}"]
    if is_given(node):
        return []
    layer = BUILDERS[node.target](scope, node, attr)
    text = layer.call.format(f"self.{attr}")
    if layer.targets.startswith("first "):
        _, x, residual = layer.targets.split()
        normed, total = _targets(scope, node).split(", ")
        return [
            f"{pad}if {residual} is None:",
            f"{pad}    {total} = {x}",
            f"{pad}    {normed} = self.{attr}({x})",
            f"{pad}else:",
            f"{pad}    {normed}, {total} = {text}",
        ]
    targets = _targets(scope, node)
    if layer.targets:
        targets = layer.targets.format(targets)
    return [f"{pad}{targets} = {text}"]


def _targets(scope: Scope, node: fx.Node) -> str:
    """The variables that a node's value goes to."""
    types = node.meta["type"]
    if isinstance(types, TensorType):
        return scope.bind(node)
    parts = {p.args[1]: p for p in node.users if is_call(p, operator.getitem)}
    names = []
    for i in range(len(types)):
        names.append(scope.bind(parts[i]) if i in parts else "_")
    return ", ".join(names)
