"""Plain tensors that are parts of whole ones, as torch.distributed.checkpoint plans them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import (
    _create_read_items,
    create_read_items_for_chunk_list,
)


class Place(Protocol):
    """Where this process's tensor lies in the whole one: a box. See `CompiledModel.placements`."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # of the whole tensor
    @property
    def offset(self) -> tuple[int, ...]: ...  # of the box's first element
    @property
    def size(self) -> tuple[int, ...]: ...  # of the box: the shape of this process's tensor


Places = Mapping[str, Place]


def is_part(place: Place | None) -> bool:
    """Whether it is less than the whole."""
    return place is not None and tuple(place.size) != tuple(place.shape)


class SavePlanner(DefaultSavePlanner):
    """DCP's own, in which a tensor that has a place is written as that part of the whole."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = {name: place for name, place in places.items() if is_part(place)}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [self._placed(item) for item in plan.items]
        self.plan = dataclasses.replace(plan, items=[item for item in items if item is not None])
        return self.plan

    def _placed(self, item: WriteItem) -> WriteItem | None:
        """The item for its part of the whole; None where a rank's part is empty."""
        place = self.places.get(item.index.fqn)
        if place is None:
            return item
        if 0 in place.size:
            return None
        assert item.tensor_data is not None
        data = TensorWriteData(_chunk(place), item.tensor_data.properties, torch.Size(place.shape))
        index = MetadataIndex(item.index.fqn, torch.Size(place.offset))
        return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index: MetadataIndex) -> Any:
        placed = index.fqn in self.places
        return self.state_dict[index.fqn] if placed else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """DCP's own, in which a tensor that has a place is filled with that part of the whole."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = {name: place for name, place in places.items() if is_part(place)}

    def create_local_plan(self) -> LoadPlan:
        assert isinstance(self.metadata, Metadata)
        items = []
        for name, tensor in self.state_dict.items():
            stored: Any = self.metadata.state_dict_metadata[name]
            place = self.places.get(name)
            if place is None:
                items += _create_read_items(name, stored, tensor)
            elif 0 not in place.size:
                items += create_read_items_for_chunk_list(name, stored, [_chunk(place)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        placed = index.fqn in self.places
        return self.state_dict[index.fqn] if placed else super().lookup_tensor(index)


def _chunk(place: Place) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.size))
