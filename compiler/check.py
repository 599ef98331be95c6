"""`fm.check`: whether a model can be cut for a number of ranks, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from compiler.needs import Need, served_needs, strongest
from compiler.vllm_target import lower_to_vllm
from funcmodels.config_json import FIELD_OF_AXIS, config_of_fields
from funcmodels.errors import ShardingError
from funcmodels.spec import Model


def check(model: Model, *, tp: int = 1) -> list[int]:
    """Refuse a tensor-parallel size that the model's axes do not allow.

    Takes no GPU, no weights and no process group.

    Returns:
        The sizes that are allowed, at most eight.
    Raises:
        ShardingError: names the axis, what is needed, and the sizes that work.
    """
    needs = served_needs(lower_to_vllm(model))
    check_needs(model, needs, tp)
    return allowed(needs)


def check_needs(model: Model, needs: Iterable[Need], tp: int) -> None:
    """Raise for the first demand that a number of ranks does not meet."""
    # A sharded axis asks for little by itself, and for division where an operation needs that.
    needs = strongest(needs)
    failed = [need for need in needs if not need.allows(tp)]
    if not failed:
        return
    need = failed[0]
    raise ShardingError(
        f'cannot split axis "{need.axis}" over mesh axis "tp"',
        got=", ".join([*_sizes(model, needs), f"tp={tp}"]),
        need="; ".join(dict.fromkeys(map(_demand, needs))),
        from_=f"{_paths(model, need.axis)}, {need.where}",
        fix=f"tp in {{{', '.join(map(str, allowed(needs)))}}}, "
        f'or leave "{need.axis}" out of sharding',
    )


def allowed(needs: Iterable[Need], limit: int = 1024) -> list[int]:
    """The numbers of ranks that meet all demands, up to a limit, at most eight."""
    needs = list(needs)
    return [tp for tp in range(1, limit + 1) if all(need.allows(tp) for need in needs)][:8]


def _demand(need: Need) -> str:
    if need.exact:
        return f"tp divides {need.axis}"
    return f"tp divides {need.axis} (split) or is a multiple of it (replicate)"


def _sizes(model: Model, needs: list[Need]) -> list[str]:
    """`num_attention_heads=9`: axes by the config's names for them, where it has them."""
    config = config_of_fields(model)
    out = []
    for axis, units in dict.fromkeys((n.axis, n.units) for n in needs):
        field = FIELD_OF_AXIS.get(axis, axis)
        out.append(f"{field if config.get(field) == units else axis}={units}")
    return out


def _paths(model: Model, axis: str) -> str:
    """The first parameter with an axis, with `*` for the index of its layer."""
    path = next(path for path, param in model.by_path.items() if axis in param.axes)
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
