"""A model's forward function and declarations -> a `Program`, without allocating anything.

The function runs once, on fake tensors with a symbolic number of tokens, under a
`TorchFunctionMode` that writes down each torch function and each op of `funcmodels.ops`. Calls of
`@block` functions stay calls: each distinct (function, shapes, static arguments) is recorded the
first time, and later calls only bind their parameters to it. So the cost does not grow with depth.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    in_kernel_invocation_manager,
)
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from compiler import aten, branches, mapped_attention, refuse, transforms
from compiler.ir import (
    MODEL_DTYPE,
    Block,
    Program,
    Sym,
    TensorType,
    add_node,
    target_name,
)
from compiler.names import argument_names, identifier, name_by_users_variables, unique
from compiler.normalize import is_identity, normalize, on_one_device, where_it_is
from compiler.recurrence import blocks_within as within
from compiler.shapes import result_of
from compiler.static import snapshot, surroundings
from compiler.trace_recurrence import record_recurrence, record_scan
from compiler.verify import verify
from funcmodels import ops
from funcmodels.block import set_tracer
from funcmodels.errors import TraceError
from funcmodels.source import SourceLine, is_users, users_line
from funcmodels.spec import Model, Param

_CPU = torch.device("cpu")

# Symbolic sizes need an example. A program that branches on it is refused, so it never matters.
_EXAMPLES = {"num_tokens": 499, "batch": 467, "seq": 499}


def trace(model: Model, *, batched: bool = False, segments: bool = False) -> Program:
    """Record a model's forward function as a program.

    Args:
        model: the model.
        batched: whether tokens are (batch, seq), or vLLM's flat (num_tokens,).
        segments: whether `segment_ids` are given.
    Raises:
        TraceError: the function is not a pure function of its arguments that can be recorded, or
            does not return logits; each error names the user's line.
    """
    dims = ("batch", "seq") if batched else ("num_tokens",)
    tracer = _Tracer(model, dims, segments)
    program = tracer.run()
    # Does Python decide by what it read of a tensor? Then the program differs for others.
    if tracer.dtype_read is not None:
        for dtype in (torch.bfloat16, torch.float32):
            other = _Tracer(model, dims, segments, dtype=dtype).run()
            if _outline(other, dtype) != _outline(program, dtype):
                raise refuse.branch_on_dtype(tracer.dtype_read)
    if tracer.device_read is not None:
        other = _Tracer(model, dims, segments, device=torch.device("cuda", 0)).run()
        if _outline(other, MODEL_DTYPE) != _outline(program, MODEL_DTYPE):
            raise refuse.branch_on_device(tracer.device_read)
    return program


def _outline(program: Program, dtype: torch.dtype) -> list[str]:
    """A program as text that is the same for the stand-in and for another dtype in its place."""
    same = {str(MODEL_DTYPE), str(dtype)}

    def line(node: fx.Node) -> str:
        args = map_aggregate((node.args, node.kwargs), lambda a: "model" if str(a) in same else a)
        return f"{node.op} {target_name(node.target)} {args}"

    blocks = [inner for block in program.all() for inner in (block, *within(block))]
    return [line(node) for block in blocks for node in block.graph.nodes]


class _Shapes(ShapeEnv):
    """The sizes that are symbols, with what torch assumes of them."""

    def _get_user_frame(self) -> FrameType | None:
        """Where a guard is made: torch's own answer imports half of it first, to look past that."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not is_users(frame.f_code.co_filename):
            frame = frame.f_back
        return frame


class _Scope:
    """The block being recorded: its graph, and what it may use."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}  # id of a tensor -> the node that made it
        self.params: dict[str, Param] = {}
        self.param_names: dict[int, str] = {}  # id of a parameter -> its name in this block
        self.keep: list[Tensor] = []  # an id is unique only while its tensor lives
        self.below: list[fx.Node] = []  # what transforms made

    def bind(self, value: Tensor, node: fx.Node) -> None:
        self.nodes[id(value)] = node
        self.keep.append(value)

    def own(self, value: Tensor, name: str, param: Param) -> None:
        self.params[name] = param
        self.param_names[id(value)] = name
        self.keep.append(value)


@dataclass(frozen=True)
class _Recorded:
    """A block's recording: with the tensors it returned, and how they form its result."""

    block: Block
    tensors: list[Tensor]
    leaves: list[Any]
    spec: pytree.TreeSpec


class _Tracer(TorchFunctionMode):
    """Runs the user's function and writes down what it does."""

    def __init__(
        self,
        model: Model,
        dims: tuple[str, ...],
        segments: bool,
        *,
        dtype: torch.dtype = MODEL_DTYPE,
        device: torch.device = _CPU,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = device  # what the user's Python is told; the fakes are all of the CPU
        self.dtype_read: SourceLine | None = None  # where Python first looked at the model's dtype
        self.device_read: SourceLine | None = None  # and where at a tensor's device
        self.model = model
        self.dims = dims
        self.segments = segments
        # By itself torch would take sizes to be 2 or more, and no branch on one token would show.
        self.shapes = _Shapes(specialize_zero_one=False)
        self.fake = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        # An operation is seldom met twice, since a block is recorded once: keys of symbolic shapes
        # take longer than what a cache would spare, a fifth of the time of a trace.
        self.fake.cache_enabled = False
        self.scopes: list[_Scope] = []
        self.recorded: dict[Any, _Recorded] = {}
        self.metas: dict[Any, Tensor] = {}
        self.blank = vars(FakeTensor(self.fake, torch.empty(0, device="meta"), _CPU))
        self.paths: dict[int, str] = {}  # id of a parameter -> its path
        self.kinds: dict[int, int] = {}  # id of a parameter -> the number of its kind
        self.numbers: dict[Any, int] = {}
        self.symbols: dict[str, str] = {}  # torch's symbol -> our name
        self.sizes: dict[Any, Sym] = {}  # torch's expressions -> ours: renaming one is slow
        self.guards = 0
        self.in_step = False  # where a step's own functions are recorded: they have no modules
        self.takes_gradients = torch.is_grad_enabled()
        self.refused: TraceError | None = None
        self.below = transforms.Below(self._record_below)
        self.passing: Any = None  # the function that is at work inside a transform

    # The run

    def run(self) -> Program:
        scope = _Scope()
        self.scopes.append(scope)
        inputs = self._inputs()
        tokens = inputs["tokens"]
        values = [self._parameter(path, param) for path, param in self.model.by_path.items()]
        params = pytree.tree_unflatten(values, self.model.structure)
        with self.fake:
            for name, value in inputs.items():
                scope.bind(value, self._node("placeholder", name, value))
            before = set_tracer(self)
            try:
                with (
                    self,
                    _device_reads(self._read_device),
                    branches.seen(self._refuse_branch),
                    torch.compiler.set_stance("force_eager"),  # what is compiled is recorded too
                    transforms.recorded(self, self.below),
                ):
                    logits = self._call(self.model.forward, (params, *inputs.values()), {})
            finally:
                set_tracer(before)
        refuse.wrong_result(self.model.forward, logits, tokens)
        self._return([self._node_of(logits, self.model.forward)])
        root = Block("forward", scope.graph, scope.params, function=self.model.forward)
        name_by_users_variables(root)
        program = Program(self.model, root, {r.block.name: r.block for r in self.recorded.values()})
        verify(program)
        return program

    def _inputs(self) -> dict[str, Tensor]:
        """Fake tokens, positions and, if asked for, segment ids of one symbolic shape."""
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(self.dims))
        real = torch.empty([_EXAMPLES[dim] for dim in self.dims], dtype=torch.int64)
        tokens = self.fake.from_tensor(real, symbolic_context=context)
        for size, name in zip(tokens.shape, self.dims, strict=True):
            self.symbols[str(size.node.expr)] = name  # type: ignore[attr-defined]
        names = ["tokens", "positions", *(["segment_ids"] if self.segments else [])]
        with self.fake:
            inputs = {name: torch.empty_like(tokens) for name in names}
        self.guards = len(self.shapes.guards)  # what torch asks of a tensor's layout
        return inputs

    def _parameter(self, path: str, param: Param) -> Tensor:
        """A fake of its own for each parameter: identity is what tells them apart."""
        kind = (param.shape, param.dtype)
        if kind not in self.metas:
            dtype = param.dtype or self.dtype
            self.metas[kind] = torch.empty(param.shape, dtype=dtype, device="meta")
        value = self._fake_of(self.metas[kind])
        self.paths[id(value)] = path
        self.scopes[-1].own(value, path, param)
        # Parameters of one kind make calls of one block; a number compares faster than all this.
        kind = (param.axes, param.shape, param.dtype, self.model.specs[path], param.hf)
        self.kinds[id(value)] = self.numbers.setdefault(kind, len(self.numbers))
        return value

    def _call(self, fn: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Call a function of the user's; what it must not do becomes our error."""
        before, drawn = pytree.tree_leaves((args, kwargs)), refuse.random_states()
        try:
            result = fn(*args, **kwargs)
        except GuardOnDataDependentSymNode as error:
            raise refuse.branch_on_value(error) from error
        except Exception as error:
            refuse.say_where(error)
            if type(error).__module__ == "torch._dynamo.exc":  # it tried to compile a function
                where = refuse.raised_at(error)
                raise refuse.given_a_function("scan, cond or the like", where) from error
            if self.refused is not None:  # what came of it says less
                raise self.refused from error
            raise
        self._check_branches()
        refuse.drew_numbers(fn, drawn)
        refuse.mutated_tree(fn, before, pytree.tree_leaves((args, kwargs)))
        if self.refused is not None:
            raise self.refused
        return result

    def _check_context(self) -> None:
        """What a `with` changes about operations would be lost: they are recorded without it."""
        if torch.is_grad_enabled() != self.takes_gradients:
            raise refuse.context("torch.no_grad or torch.inference_mode", "x.detach()")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise refuse.context("torch.autocast", "x.to(dtype) where a cast is meant")

    def _check_branches(self) -> None:
        """A guard that no operation made was made by the user's Python: a branch on a size."""
        if len(self.shapes.guards) > self.guards:
            guard = self.shapes.guards[self.guards]
            raise refuse.branch_on_size(guard.expr, self.symbols, _line_of(guard))

    def _refuse_branch(self, expression: Any) -> None:
        self.refused = self.refused or refuse.branch_on_size(expression, self.symbols, users_line())
        raise self.refused

    # Nodes

    def _node(
        self, op: str, target: Any, value: Any, args: tuple = (), kwargs: Any = None
    ) -> fx.Node:
        node = add_node(self.scopes[-1].graph, op, target, args, kwargs or {})
        node.meta["where"] = users_line()
        one = isinstance(value, Tensor)
        types = self._type(value) if one else pytree.tree_map_only(Tensor, self._type, value)
        node.meta["type"] = tuple(types) if isinstance(types, list) else types  # aten's are lists
        return node

    def _type(self, value: Tensor) -> TensorType:
        return TensorType(value.dtype, tuple(self._size(n) for n in value.shape))

    def _size(self, n: Any) -> Any:
        """An int, or a symbolic size's expression in the names of the model's dims."""
        if isinstance(n, torch.SymFloat):
            raise refuse.size_as_value(n, self.symbols)
        if not isinstance(n, torch.SymInt):
            return n
        expr = n.node.expr
        if expr.is_Integer:
            return int(expr)
        if expr in self.sizes:
            return self.sizes[expr]
        if any(str(s) not in self.symbols for s in expr.free_symbols):
            raise refuse.branch_on_value(None, "the shape of this")
        renamed = expr.subs({s: self.symbols[str(s)] for s in expr.free_symbols})
        return self.sizes.setdefault(expr, Sym(str(renamed)))

    def _node_of(self, value: Tensor, user: Any) -> fx.Node:
        """The node that made a tensor, in the block being recorded."""
        scope = self.scopes[-1]
        node = scope.nodes.get(id(value))
        if node is not None:
            return node
        if (name := scope.param_names.get(id(value))) is not None:
            node = self._node("get_attr", name, value)
            scope.bind(value, node)
            return node
        if (path := self.paths.get(id(value))) is not None:
            raise refuse.closure(f"the parameter {path}", user)
        if any(id(value) in outer.nodes for outer in self.scopes[:-1]):
            raise refuse.closure("a value of the calling function", user)
        raise refuse.global_tensor(value, user)

    def _as_nodes(self, args: Any, user: Any) -> Any:
        """Arguments, with tensors as nodes and symbolic sizes as `Sym`s."""

        def one(leaf: Any) -> Any:
            return self._node_of(leaf, user) if isinstance(leaf, Tensor) else self._size(leaf)

        return map_aggregate(args, one)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return self._record_call(func, args, kwargs)
        except TraceError as error:
            self.refused = self.refused or error  # the user's own `except` must not hide it
            raise

    def _record_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._check_branches()
        refuse.impure(func, args, kwargs)
        args, kwargs = on_one_device(func, args, kwargs, _CPU)
        if transforms.is_transforming():
            return self._pass_on(func, args, kwargs)
        try:
            out = result_of(func, args, kwargs)
        except GuardOnDataDependentSymNode as error:
            raise refuse.branch_on_value(error) from error
        except DataDependentOutputException as error:
            raise refuse.branch_on_value(error, target_name(func)) from error
        except UnsupportedOperatorException as error:
            raise refuse.without_shapes(func, error) from error
        except RuntimeError as error:
            refuse.two_dtypes(func, args, kwargs, error)
            if self._takes_float32(func, args, kwargs):
                raise refuse.not_of_dtype(func, error) from error
            raise
        self._note_guards(func)
        refuse.of_no_dtype(func, args[:1], out)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(out)):
            if is_users(sys._getframe(2).f_code.co_filename):  # not torch's own Python
                return self._read(func, out)
            return out
        self._check_context()
        if is_identity(func, args, kwargs):
            out = out.detach()
            self.scopes[-1].bind(out, self._node_of(args[0], func))
            return out
        out = self._with_own_identity(out, args, kwargs)
        target, args, kwargs = normalize(func, args, kwargs)
        if target is torch.reshape:
            args = (args[0], _inferred(args[1]))
        args, kwargs = self._as_nodes(args, func), self._as_nodes(kwargs, func)
        self._bind(self._node("call_function", target, out, args, kwargs), out)
        return out

    def _takes_float32(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation that failed is one that torch has for float32 and not for halves."""
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, Tensor) and leaf.dtype is self.dtype for leaf in leaves):
            return False

        def wider(value: Tensor) -> Tensor:
            return value.float() if value.dtype is self.dtype else value

        given = pytree.tree_map_only(Tensor, wider, (args, kwargs))
        try:
            func(*given[0], **given[1])
        except Exception:
            return False
        return True

    # Below transforms

    def _pass_on(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call inside a transform: what becomes of it below is recorded, and not the call."""
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
            self.passing = func
            if func is ops.attention and mapped_attention.only_maps():
                return mapped_attention.mapped(self._attention, *args, **kwargs)
            try:
                out = transforms.call(func, args, kwargs)
            except RuntimeError as error:
                if "directly modify sizes" in str(error):  # torch's words for a shape not its own
                    raise refuse.not_below(func, error) from error
                raise
            self._note_guards(func)
            tensors = (isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(out))
            return out if any(tensors) else self._read(func, out)
        with transforms.outside(self.below):  # a new tensor depends on nothing that is transformed
            return self._record_call(func, args, kwargs)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, settings: dict[str, Any]) -> Tensor:
        with transforms.outside(self.below):
            return self._record_call(ops.attention, (q, k, v), settings)

    def _record_below(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Write down an operation of aten that a transform has made."""
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
        self._note_guards(self.passing)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(out)):
            return out
        scope = self.scopes[-1]
        args, kwargs = pytree.tree_map_only(Tensor, _number, (args, kwargs))
        target, args, kwargs = aten.as_torch(func, args, kwargs, out)
        viewed = target in (torch.reshape, Tensor.expand) and args[0] is not out
        if target is aten.same or (viewed and self._type(args[0]) == self._type(out)):
            scope.bind(out, self._node_of(args[0], func))
            return out
        if target is torch.reshape:
            args = (args[0], _inferred(args[1]))
        args, kwargs = self._as_nodes(args, func), self._as_nodes(kwargs, func)
        node = self._node("call_function", target, out, args, kwargs)
        self._bind(node, out)
        scope.below += [node, *node.users]
        return out

    def _note_guards(self, func: Any) -> None:
        """What an operation itself assumes of sizes is no branch of the user's."""
        for guard in self.shapes.guards[self.guards :]:
            if _fixes_a_size(guard.expr):
                raise refuse.fixes_size(func)
        self.guards = len(self.shapes.guards)

    def _read(self, func: Any, out: Any) -> Any:
        """What Python is told that is no value of a tensor, but differs from run to run."""
        if out is self.dtype and self.dtype_read is None:
            self.dtype_read = users_line()
        on = where_it_is(func)
        return out if on is None else on(self._read_device())

    def _read_device(self) -> torch.device:
        self.device_read = self.device_read or users_line()
        return self.device

    def _with_own_identity(self, out: Any, args: Any, kwargs: Any) -> Any:
        """A result that is one of the arguments itself becomes an object of its own."""
        given = {id(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        return pytree.tree_map_only(Tensor, lambda t: t.detach() if id(t) in given else t, out)

    def _bind(self, node: fx.Node, out: Any) -> None:
        """One tensor is its node; several are taken out of it by index."""
        scope = self.scopes[-1]
        if isinstance(out, Tensor):
            scope.bind(out, node)
            return
        for i, value in enumerate(out):
            part = self._node("call_function", operator.getitem, value, (node, i))
            scope.bind(value, part)

    def _return(self, nodes: list[fx.Node]) -> None:
        scope = self.scopes[-1]
        scope.graph.output(tuple(nodes))
        for node in reversed(scope.below):  # a transform computes more than it needs
            if not node.users:
                scope.graph.erase_node(node)

    # Blocks

    def call_block(self, fn: Callable[..., Any], args: tuple, kwargs: dict, *, remat: bool) -> Any:
        """Record a block the first time it is called in this way, and a call of it every time."""
        self._check_branches()
        if transforms.is_transforming() or self.in_step:  # where no module is called
            return fn(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        with torch._C.DisableTorchFunction():  # looking at shapes is no operation of the model
            described = tuple(self._describe(leaf, fn) for leaf in leaves)
        key = (fn, remat, spec, described, _aliases(leaves), surroundings(fn))
        found = self.recorded.get(key)  # once: it hashes all of the key
        if found is None:
            found = self.recorded[key] = self._record(fn, leaves, spec, remat)
        with torch._C.DisableTorchFunction():
            return self._call_of(found, fn, leaves)

    # Recurrences

    def call_recurrence(self, **given: Any) -> Any:
        return record_recurrence(self, **given)

    def call_associative_scan(self, combine: Callable[..., Any], xs: Any, dim: int) -> Any:
        return record_scan(self, combine, xs, dim)

    # Calls of blocks

    def _call_of(self, found: _Recorded, fn: Callable[..., Any], leaves: list[Any]) -> Any:
        """A call of a recorded block: its node, and values of its own for its results."""
        scope = self.scopes[-1]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = tuple(self._node_of(t, fn) for t in tensors if id(t) not in self.paths)
        owned = [self._own_name(t, fn) for t in tensors if id(t) in self.paths]
        results = [self._alike(t) for t in found.tensors]
        single = len(results) == 1
        call = self._node(
            "call_module", found.block.name, results[0] if single else tuple(results), inputs
        )
        call.meta["binding"] = dict(zip(found.block.params, owned, strict=True))
        self._bind(call, results[0] if single else results)
        scope.keep.extend(results)
        rest = iter(results)
        out = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in found.leaves]
        return pytree.tree_unflatten(out, found.spec)

    def _alike(self, value: Tensor) -> Tensor:
        """Another fake of the same type: each call of a block has results of its own."""
        with in_kernel_invocation_manager(self.fake):  # where a fake shows itself as what it is
            return self._fake_of(value)

    def _fake_of(self, meta: Tensor) -> Tensor:
        """A fake of a meta tensor, as its constructor makes them, in a tenth of the time.

        A deep model has thousands; through the fake mode they would take longer still.
        """
        fake = Tensor._make_subclass(
            FakeTensor,
            meta,
            False,
            dispatch_device=True,
            device_for_backend_keys=_CPU,
        )
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(self.blank)
        return fake

    def _own_name(self, value: Tensor, fn: Any) -> str:
        """The name of a parameter in the block being recorded."""
        name = self.scopes[-1].param_names.get(id(value))
        if name is None:
            raise refuse.closure(f"the parameter {self.paths[id(value)]}", fn)
        return name

    def _describe(self, leaf: Any, fn: Callable[..., Any]) -> Any:
        """What of an argument decides whether two calls are of one block."""
        if isinstance(leaf, Tensor):
            path = self.paths.get(id(leaf))
            if path is None:
                return (leaf.dtype, tuple(map(str, leaf.shape)))
            return self.kinds[id(leaf)]
        try:
            hash(found := snapshot(leaf))
        except TypeError:
            raise refuse.unhashable(leaf, fn) from None
        return found

    def _record(
        self,
        fn: Callable[..., Any],
        leaves: list[Any],
        spec: Any,
        remat: bool = False,
        arranged: Callable[[Any], Any] = lambda result: result,
        names: list[str] | None = None,
    ) -> _Recorded:
        """Run a block's function once, on the tensors of its first call."""
        scope = _Scope()
        self.scopes.append(scope)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        static: dict[str, Any] = {}
        names = names or argument_names(fn, args, kwargs)
        for name, leaf in zip(names, leaves, strict=True):
            path = self.paths.get(id(leaf))
            if path is not None:
                scope.own(leaf, name, self.model.by_path[path])
            elif isinstance(leaf, Tensor):
                scope.bind(leaf, self._node("placeholder", name.replace(".", "_"), leaf))
            else:
                static[name] = leaf
        out, out_spec = pytree.tree_flatten(arranged(self._call(fn, args, kwargs)))
        tensors = [t for t in out if isinstance(t, Tensor)]
        self._return([self._node_of(t, fn) for t in tensors])
        self.scopes.pop()
        taken = {r.block.name for r in self.recorded.values()} | {"forward"}
        name = unique(identifier(refuse.name_of(fn)), taken)
        block = Block(name, scope.graph, scope.params, static, fn, remat)
        name_by_users_variables(block)
        return _Recorded(block, tensors, out, out_spec)


def _aliases(leaves: list[Any]) -> tuple[int, ...] | None:
    """Which tensors of a call are one and the same; None where no two are."""
    ids = [id(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    return None if len(set(ids)) == len(ids) else tuple(map(ids.index, ids))


@contextmanager
def _device_reads(read: Callable[[], torch.device]) -> Iterator[None]:
    """Let `read` answer the user's Python on `x.device`: of fakes, no mode is told of that."""
    plain = FakeTensor.device

    def device(tensor: FakeTensor) -> torch.device:
        if is_users(sys._getframe(1).f_code.co_filename):
            return read()
        return plain.fget(tensor)  # type: ignore[attr-defined]

    FakeTensor.device = property(device, plain.fset)  # type: ignore[attr-defined, assignment]
    try:
        yield
    finally:
        FakeTensor.device = plain  # type: ignore[assignment]


def _line_of(guard: Any) -> SourceLine:
    """Where a guard was made: that is noticed at an operation after it."""
    at = guard.sloc.framework_loc
    if hasattr(at, "filename") and is_users(at.filename):
        return SourceLine(at.filename, at.lineno, at.name)
    return users_line()


def _fixes_a_size(guard: Any) -> bool:
    """Whether a guard says that a size is one number: what a loop over tokens unrolls to."""
    return guard.is_Relational and guard.rel_op == "==" and guard.lhs.is_Atom and guard.rhs.is_Atom


def _number(value: Tensor) -> Any:
    """A number that torch has made a tensor of on the way, as a number again."""
    return value if isinstance(value, FakeTensor) or value.dim() else value.item()


def _inferred(shape: tuple) -> tuple:
    """A reshape's sizes, with its one symbolic size left to torch: -1."""
    if sum(isinstance(n, torch.SymInt) for n in shape) == 1 and -1 not in shape:
        return tuple(-1 if isinstance(n, torch.SymInt) else n for n in shape)
    return shape
