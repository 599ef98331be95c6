"""What `fm.fit` is given, looked at before it trains: what cannot work is refused by name."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcmodels import tree
from funcmodels.errors import ShapeError, TrainingError, listed
from funcmodels.spec import Model

if TYPE_CHECKING:
    from compiler.torch_target import CompiledModel

# torch.optim's name and ours, with what makes them the same.
OURS = {
    "AdamW": "adamw({lr})",
    "Adam": "adamw({lr}, weight_decay=0.0)",
    "SGD": "sgd({lr})",
    "Muon": "muon({lr}, fm.optim.matrices(model), rest=fm.optim.adamw(3e-4))",
}


def check_arguments(
    model: Model | CompiledModel,
    weights: Any,
    data: Any,
    optimizer: Any,
    *,
    loss: Any,
    clip: Any,
    dtype: Any,
    evaluate: Any,
    **counts: Any,
) -> None:
    """Refuse arguments of `fit` that cannot work, or that would do something else in silence.

    Args:
        loss: None is `fm.loss`, which needs the parameters of the model; a loss of the user's own
            may take any tree.
        **counts: by their names, the arguments that are numbers of steps or of parts.
    Raises:
        TrainingError: an argument cannot work.
        ShapeError: a weight has another shape than the parameter.
    """
    for name, value in counts.items():
        _check_count(name, value)
    _check_clip(clip)
    _check_dtype(dtype)
    _check_optimizer(optimizer)
    _check_data(data)
    if evaluate is not None and not callable(evaluate):
        raise TrainingError(
            "fit: evaluate is no function",
            got=f"evaluate={type(evaluate).__name__}",
            need="a function: weights -> {name: number}",
            fix='evaluate=lambda weights: {"loss": mean_loss(weights)}',
        )
    if loss is not None:
        _check_takes("loss", loss, ("model", "weights", "batch"))
    if evaluate is not None:
        _check_takes("evaluate", evaluate, ("weights",))
    _check_tensors(model, weights)
    if loss is None:
        _check_paths(model, weights)
        _check_shapes(model, weights)


def check_batch(batch: Any, position: int) -> None:
    """Refuse a batch that `fm.loss` cannot take.

    Raises:
        TrainingError: it is no mapping, or has no tokens.
    """
    if isinstance(batch, Mapping):
        if isinstance(batch.get("tokens"), Tensor):
            return
        got = (
            listed(map(str, batch))
            if "tokens" not in batch
            else f"tokens: {_kind(batch['tokens'])}"
        )
    else:
        got = _kind(batch)
    fix = "fm.pack(documents, length), or a loss of your own: fm.fit(..., loss=)"
    if isinstance(batch, Tensor):
        fix = f'{{"tokens": batch}}, or {fix}'
    elif isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        fix = f'{{"tokens": batch["input_ids"]}} where nothing is padded, or {fix}'
    raise TrainingError(
        f"fit: batch {position} of the data has no tokens",
        got=got,
        need='a mapping with "tokens", a tensor (*batch, seq), as fm.pack makes it',
        fix=fix,
    )


def check_evaluation(values: Any) -> dict[str, float]:
    """What `evaluate` returned, as it can be logged: a tensor of one number is that number.

    Raises:
        TrainingError: it is no mapping, or a value of it is no number.
    """
    if not isinstance(values, Mapping):
        raise TrainingError(
            "fit: evaluate returned no mapping",
            got=_kind(values),
            need="{name: number}",
            fix='return {"loss": value}',
        )
    found = {}
    for name, value in values.items():
        is_one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
        if not (is_one or isinstance(value, Real)):
            raise TrainingError(
                f"fit: evaluate returned no number for {name}",
                got=f"{name}: {_kind(value)}",
                need="{name: number}, or a tensor of one",
                fix=f"{name}.mean()" if isinstance(value, Tensor) else f"leave out {name}",
            )
        found[name] = float(value.item() if isinstance(value, Tensor) else value)
    return found


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1:
        return
    near = float(value) if isinstance(value, Real) else math.nan
    raise TrainingError(
        f"fit: {name} is no number of {'parts' if name == 'microbatches' else 'steps'}",
        got=f"{name}={value!r}",
        need=f"an int, {name} >= 1",
        fix=f"{name}={max(1, round(near)) if math.isfinite(near) else 1}",
    )


def _check_clip(clip: Any) -> None:
    """Of a norm below zero, gradients would be turned round."""
    if clip is None or (isinstance(clip, Real) and not isinstance(clip, bool) and float(clip) > 0):
        return
    raise TrainingError(
        "fit: clip is no norm that gradients could be scaled to",
        got=f"clip={clip!r}",
        need="clip > 0, the largest norm of all gradients together, or None",
        fix="clip=1.0, or clip=None to leave the gradients as they are",
    )


def _check_dtype(dtype: Any) -> None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    is_one = isinstance(named, torch.dtype) and named.is_floating_point
    raise TrainingError(
        "fit: dtype is none that a model could compute in",
        got=f"dtype={dtype!r}",
        need="a floating dtype of torch, or None for that of the weights",
        fix=f"dtype={named if is_one else torch.bfloat16}",
    )


def _check_takes(name: str, fn: Any, arguments: tuple[str, ...]) -> None:
    """A function of the user's can be called with what it will be given."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a built-in one, which says nothing of its arguments
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        given = ", ".join(arguments)
        called = getattr(fn, "__name__", type(fn).__name__)
        raise TrainingError(
            f"fit: {name} takes other arguments than it is given",
            got=f"{name}={called}{signature}: {error}",
            need=f"({given})",
            fix=f"{name}=lambda {given}: ...",
        ) from None


def _check_optimizer(optimizer: Any) -> None:
    is_class = isinstance(optimizer, type)
    if not is_class and all(callable(getattr(optimizer, n, None)) for n in ("init", "update")):
        return
    kind = optimizer if is_class else type(optimizer)
    name = kind.__name__
    if issubclass(kind, torch.optim.Optimizer):
        lr = 3e-4 if is_class else float(optimizer.defaults.get("lr", 3e-4))
        ours = OURS.get(name, "adamw({lr})").format(lr=lr)
        raise TrainingError(
            "fit: an optimiser of torch.optim changes tensors of its own in place",
            got=f"torch.optim's {name}, {'the class' if is_class else 'an instance'}",
            need="a pair of functions: init(weights), and update(grads, state, weights)",
            fix=f"optimizer=fm.optim.{ours}",
        )
    name = getattr(optimizer, "__name__", name)
    raise TrainingError(
        "fit: the optimizer has no init and update",
        got=f"{name}, of type {type(optimizer).__name__}",
        need="a pair of functions: init(weights), and update(grads, state, weights)",
        fix=f"optimizer=fm.optim.{name if name in ('lion', 'sgd') else 'adamw'}(3e-4)",
    )


def _check_data(data: Any) -> None:
    """An iterable of batches is no batch, though a batch is iterable too."""
    fix = "data=[batch], or a function of the batch's number"
    if isinstance(data, Tensor):
        fix = 'data=[{"tokens": tokens}], or a function of the batch\'s number'
    elif not isinstance(data, Mapping | str | bytes) and (
        callable(data) or isinstance(data, Iterable) or hasattr(data, "__getitem__")
    ):
        return
    raise TrainingError(
        "fit: data is no iterable of batches",
        got=_kind(data),
        need="an iterable of batches, or a function: the batch's number -> batch",
        fix=fix,
    )


def _check_tensors(model: Model | CompiledModel, weights: Any) -> None:
    """All weights are tensors, and have values."""
    module = not isinstance(model, Model)
    start = "module.weights()" if module else "fm.init(model, seed=0)"
    found = list(tree.items(weights))
    others = [f"{path or 'weights'}: {_kind(x)}" for path, x in found if not isinstance(x, Tensor)]
    if others or not found:
        raise TrainingError(
            "fit: weights is no tree of tensors",
            got=listed(others) if others else "no tensors",
            need="a tensor for each parameter",
            fix=f"weights = {start}",
        )
    empty = [path for path, x in found if x.is_meta]
    if empty:
        raise TrainingError(
            "fit: the weights are on the meta device, and have no values",
            got=listed(empty),
            need="weights that are initialised or loaded",
            fix="module.reset(seed=0) first, or module.load(weights); then module.weights()"
            if module
            else f"weights = {start}, or fm.load(model, folder)",
        )


def _check_paths(model: Model | CompiledModel, weights: Any) -> None:
    """The weights have a leaf for each parameter, and none besides."""
    declared = model if isinstance(model, Model) else model.model
    got, need = {path: None for path, _ in tree.items(weights)}, declared.by_path
    missing = [path for path in need if path not in got]
    extra = [path for path in got if path not in need]
    flat = isinstance(weights, Mapping) and [key for key in weights if "." in str(key)]
    if flat and not missing:
        raise TrainingError(
            "fit: weights is a flat dict, whose keys are paths",
            got=listed(map(str, flat)),
            need="a tree as model.params: dicts and lists in one another",
            fix="weights = fm.tree.unflatten(model.params, weights)",
        )
    if missing or extra:
        raise TrainingError(
            f"fit: weights has not the parameters of {declared.name}",
            got=f"{len(got)} tensors: {listed(extra)} unknown",
            need=f"{len(need)} tensors: {listed(missing)} missing",
            fix=_renamed(missing, extra),
        )


def _renamed(missing: list[str], extra: list[str]) -> str:
    """The nearest path of those that are missing, or what else helps."""
    for path in extra:
        if near := difflib.get_close_matches(path, missing, n=1):
            return f"{path} is perhaps {near[0]}"
    if missing:
        return "weights = fm.init(model, seed=0), or fm.load(model, folder)"
    return f"leave out {listed(extra)}, or a loss of your own, which may take any tree"


def _check_shapes(model: Model | CompiledModel, weights: Any) -> None:
    """Each weight has its parameter's shape; on a mesh, that of this process's part."""
    if isinstance(model, Model):
        shapes = {path: tuple(param.shape) for path, param in model.by_path.items()}
        fix = "weights = fm.init(model, seed=0), or a model of the config that these weights are of"
    else:
        shapes = model.held
        fix = "weights = module.load(weights).weights(), of whole weights of this model"
    wrong = [(p, tuple(w.shape)) for p, w in tree.items(weights) if tuple(w.shape) != shapes[p]]
    if wrong:
        raise ShapeError(
            "fit: weights have other shapes than the parameters",
            got=listed(f"{path} {shape}" for path, shape in wrong),
            need=listed(f"{path} {shapes[path]}" for path, _ in wrong),
            fix=fix,
        )


def _kind(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {listed(map(str, value))}"
    return "None" if value is None else f"a value of type {type(value).__name__}"
