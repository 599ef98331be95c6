"""Declarations: `axes()` makes `Param`s, a pytree of them and a function make a `Model`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch

from funcmodels import sharding as sharding_
from funcmodels import tree
from funcmodels.errors import DeclarationError, listed
from funcmodels.init import Initializer, check_init
from funcmodels.parts import check_shared
from funcmodels.sharding import AxisTable, PartitionSpec
from funcmodels.source import SourceLine, users_line
from funcmodels.weightmap import TensorMap, tensor_map

# The tasks in which each sequence has one result, not each token.
POOLING_TASKS = ("embed", "classify")


@dataclass(frozen=True)
class Param:
    """One declared parameter: nothing is allocated.

    Args:
        axes: name of each dim.
        shape: size of each dim.
        init: "normal" (scaled by fan-in), "ones", "zeros", or a function of shape and generator.
        hf: name and layout of its tensor in a checkpoint, see `funcmodels.weightmap`.
        sharding: overrides the model's axis table for this parameter.
        dtype: None for the model's dtype.
        where: the user's line that declares it.
        known: all axes that were declared with its own.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    init: Initializer
    hf: str | None
    sharding: PartitionSpec | None
    dtype: torch.dtype | None
    where: SourceLine = field(compare=False)
    known: frozenset[str] = field(compare=False, repr=False, default=frozenset())

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Axes:
    """The named axes of a model, with their sizes; called, it declares a parameter over them."""

    def __init__(self, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise DeclarationError(
                    f'axis "{name}" has no valid size',
                    got=repr(size),
                    need="an integer of at least 1",
                    from_=users_line(),
                    fix=f"fm.axes({name}=...)",
                )
        self.sizes = dict(sizes)
        self.known = frozenset(sizes)

    def __call__(
        self,
        axes: str,
        *,
        init: Initializer = "normal",
        hf: str | None = None,
        sharding: PartitionSpec | None = None,
        dtype: torch.dtype | None = None,
    ) -> Param:
        """Declare a parameter over space-separated axes; `P("")` is a scalar.

        Raises:
            DeclarationError: an axis that is not declared, or one named twice.
        """
        names = tuple(axes.split())
        where = users_line()
        for name in names:
            if name not in self.sizes:
                self._unknown(name, axes, where)
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise DeclarationError(
                f'axis "{twice}" appears twice in one parameter',
                got=repr(axes),
                need="a name of its own for each dim",
                from_=where,
                fix=f"fm.axes(..., {twice}_out={self.sizes[twice]}) and use it for one of the two",
            )
        check_init(init, where)
        shape = tuple(self.sizes[name] for name in names)
        return Param(names, shape, init, hf, sharding, dtype, where, self.known)

    def _unknown(self, name: str, axes: str, where: SourceLine) -> None:
        near = difflib.get_close_matches(name, self.sizes, n=1)
        raise DeclarationError(
            f'unknown axis "{name}"',
            got=repr(axes),
            need=f"axes declared in fm.axes(): {listed(self.sizes)}",
            from_=where,
            fix=f'did you mean "{near[0]}"?' if near else f"add {name}=... to fm.axes()",
        )


def axes(**sizes: int) -> Axes:
    """Declare the axes of a model: `P = fm.axes(hidden=576, heads=9)`, then `P("heads hidden")`."""
    return Axes(sizes)


@dataclass(frozen=True, eq=False)
class Model:
    """A model: declared parameters and a pure function of them.

    Args:
        name: the architecture's name, as vLLM and config.json will know it.
        config: the user's own config, a dataclass or a mapping, with Hugging Face's field names.
        params: pytree of `Param`.
        forward: `forward(params, tokens, positions, segment_ids=None) -> logits`, pure, for tokens
            of shape (*batch, seq) and of shape (num_tokens,).
        sharding: axis -> mesh axis, or pairs of them, of which the first for an axis wins.
        hf_config: what config.json is to hold beside `architectures`; None builds it from `config`.
        hf_architectures: further names for `architectures`, so that others can load the folder too.
        hf_ignored: names of checkpoint tensors to pass over, with `*` for anything.
        hf_prefix: a beginning of tensor names that a checkpoint may have or leave out, as
            "transformer."; it is written as the parameters declare it.
        hf_tied: names under which a checkpoint may store a parameter again -> its path. Where one
            is stored, it must be equal: a checkpoint whose weights are not tied is refused.
        task: what forward's result is for. "generate": logits of the next token. "embed" and
            "classify": hidden states, or logits over labels, of every token, of which `pooling`
            makes one vector a sequence, see `fm.embed` and `fm.classify`. Only these two may have
            attention that is not causal.
        pooling: of a sequence's vectors: the "last" or the first ("cls"), or their "mean".
        normalize: bring an embedding to length 1; turn a classification into probabilities.

    Raises:
        DeclarationError, ShardingError: at once, when a declaration cannot work.
    """

    name: str
    config: Any
    params: Any
    forward: Callable[..., Any]
    sharding: AxisTable = field(default_factory=dict)
    hf_config: Mapping[str, Any] | None = None
    hf_architectures: tuple[str, ...] = ()
    hf_ignored: tuple[str, ...] = ()
    hf_prefix: str = ""
    hf_tied: Mapping[str, str] = field(default_factory=dict)
    task: Literal["generate", "embed", "classify"] = "generate"
    pooling: Literal["last", "mean", "cls"] | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise DeclarationError(
                f"{self.name!r} cannot name a class",
                need="letters, digits and underscores, as in MyModelForCausalLM",
                fix=f"{''.join(c for c in self.name if c.isidentifier()) or 'MyModel'!r}",
            )
        _check_forward(self.forward)
        _check_task(self.name, self.task, self.pooling)
        for path, leaf in tree.items(self.params):
            if not isinstance(leaf, Param):
                raise DeclarationError(
                    f"{path} is not a declaration",
                    got=type(leaf).__name__,
                    need="a pytree whose leaves all come from fm.axes()",
                    fix='P("axis names"), with P = fm.axes(...)',
                )
        _check_names(self.tensor_maps, self.by_path)
        params = self.by_path.values()  # a recurrent state may have axes that they have not
        declared = {axis for param in params for axis in (*param.axes, *param.known)}
        sharding_.check_table(self.table, declared)
        assert self.specs is not None  # computed now, so that its errors come now
        assert self.structure is not None

    @cached_property
    def by_path(self) -> dict[str, Param]:
        """Every parameter by its path, in the tree's order."""
        return dict(tree.items(self.params))

    @cached_property
    def structure(self) -> tree.Structure:
        """What the tree is without its leaves: with those of `by_path`, the tree again."""
        return tree.structure(self.params)

    @cached_property
    def table(self) -> dict[str, str | None]:
        """The axis table as a dict."""
        return sharding_.table_of(self.sharding)

    @cached_property
    def specs(self) -> dict[str, PartitionSpec]:
        """The PartitionSpec of every parameter, by path."""
        seen: dict[int, PartitionSpec] = {}
        for param in self.by_path.values():
            if id(param) not in seen:
                seen[id(param)] = sharding_.partition_spec(param, self.table)
        return {path: seen[id(param)] for path, param in self.by_path.items()}

    @cached_property
    def tensor_maps(self) -> dict[str, TensorMap]:
        """How every parameter lies in a checkpoint, by path."""
        return {
            path: tensor_map(p.hf, path, p.axes, p.shape, p.where)
            for path, p in self.by_path.items()
        }

    @cached_property
    def prefixed(self) -> frozenset[str]:
        """First parts of tensor names that stand for those with `hf_prefix` before them."""
        names = (name for map_ in self.tensor_maps.values() for name in map_.names)
        own = (n.removeprefix(self.hf_prefix) for n in names if n.startswith(self.hf_prefix))
        return frozenset(name.partition(".")[0] for name in own) if self.hf_prefix else frozenset()

    def declared_name(self, name: str) -> str:
        """A tensor's name in a checkpoint, with or without `hf_prefix` as it is declared."""
        if self.prefixed:
            return self.hf_prefix + name if name.partition(".")[0] in self.prefixed else name
        return name.removeprefix(self.hf_prefix)

    @property
    def num_parameters(self) -> int:
        return sum(param.numel for param in self.by_path.values())

    def __repr__(self) -> str:
        return f"Model({self.name}, {self.num_parameters:,} parameters)"


def _check_task(name: str, task: str, pooling: str | None) -> None:
    """A known task; a pooling where the task has one, and only there."""
    tasks, poolings = (*POOLING_TASKS, "generate"), ("last", "mean", "cls")
    if task not in tasks:
        raise DeclarationError(
            f"{name} has an unknown task",
            got=f"task={task!r}",
            need=f"one of {', '.join(tasks)}",
            fix='fm.Model(..., task="embed", pooling="last")',
        )
    if task in POOLING_TASKS and pooling not in poolings:
        raise DeclarationError(
            f"{name} does not say how a sequence becomes one vector",
            got=f"task={task!r}, pooling={pooling!r}",
            need=f"one of {', '.join(poolings)}",
            fix=f'fm.Model(..., task={task!r}, pooling="last")',
        )
    if task not in POOLING_TASKS and pooling is not None:
        raise DeclarationError(
            f"{name} generates tokens, and has nothing to pool",
            got=f"task={task!r}, pooling={pooling!r}",
            need="no pooling, or another task",
            fix=f'fm.Model(..., task="embed", pooling={pooling!r}), or leave pooling out',
        )


def _check_forward(forward: Callable[..., Any]) -> None:
    """Forward can be called with three arguments by position, and with segment_ids as a fourth."""
    signature = inspect.signature(forward)
    try:
        signature.bind(None, None, None)
        signature.bind(None, None, None, None)
    except TypeError:
        raise DeclarationError(
            f"{getattr(forward, '__name__', 'forward')} does not take what a model takes",
            got=str(signature),
            need="(params, tokens, positions, segment_ids=None)",
            fix="def forward(params, tokens, positions, segment_ids=None): ...",
        ) from None


def _check_names(maps: dict[str, TensorMap], params: dict[str, Param]) -> None:
    """No two parameters may claim one tensor of the checkpoint, but as parts of it."""
    owner: dict[str, str] = {}
    shared: dict[str, dict[str, TensorMap]] = {}
    for path, map_ in maps.items():
        for name in map_.names:
            if map_.part is not None:
                shared.setdefault(name, {})[path] = map_
            other = owner.setdefault(name, path)
            if other != path and (map_.part is None or maps[other].part is None):
                raise DeclarationError(
                    f'two parameters are stored in one tensor "{name}"',
                    got=f"{other} and {path}",
                    need="a tensor of its own for each",
                    from_=params[path].where,
                    fix="add {layers} (the enclosing list's key) to the name, or, for tied "
                    "weights, declare one parameter and use it twice",
                )
    for name, sharing in shared.items():
        check_shared(name, sharing, params[next(iter(sharing))].where)
