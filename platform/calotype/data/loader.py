"""A stream for torch's loaders.  The one room of `data` that needs torch at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset


class TorchStream(IterableDataset[dict[str, Any]]):
    """Batches as dicts of tensors; its state is the stream's."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream  # a `Stream`, which makes this: importing its room here would be a circle

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.stream:
            made: dict[str, Any] = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
            if batch.samples:
                made["sample"] = [None if sample is None else sample.members for sample in batch.samples]
            about = {"position": torch.from_numpy(batch.positions), "present": torch.from_numpy(batch.present)}
            yield made | about | {"key": batch.keys, "cursor": batch.cursor}

    def state_dict(self) -> dict[str, int]:
        return dict(self.stream.state_dict())

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stream.load_state_dict(state)
