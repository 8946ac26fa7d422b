"""Parameters of a checkpoint as tensors, read from its open safetensors files when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # this page is also read at submit, where torch is not
    from torch import Tensor


class Whole(Mapping[str, "Tensor"]):
    """Tensors of some safetensors files, read one at a time: a rank keeps only its share of a model."""

    def __init__(self, files: Iterable[Any]) -> None:
        self._where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class Pieced(Mapping[str, "Tensor"]):
    """Parameters of one kind put together, when asked for, from the pieces that the ranks saved; and the buffers."""

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        pieces: Mapping[str, Sequence[tuple[str, int, int]]],
        files: Mapping[str, Whole],
        buffers: Mapping[str, Tensor],
    ) -> None:
        self._shapes, self._buffers = shapes, buffers
        self._where: dict[str, list[tuple[int, int, Whole]]] = {name: [] for name in shapes}
        for part, file in files.items():
            for name, begin, count in pieces[part]:
                self._where[name].append((begin, count, file))

    def __getitem__(self, name: str) -> Tensor:
        if name in self._buffers:
            return self._buffers[name]
        import torch

        whole = torch.full((prod(self._shapes[name]),), torch.nan)
        for begin, count, file in self._where[name]:
            whole[begin : begin + count] = file[name]
        return whole.view(tuple(self._shapes[name]))

    def __iter__(self) -> Iterator[str]:
        yield from self._shapes
        yield from self._buffers

    def __len__(self) -> int:
        return len(self._shapes) + len(self._buffers)
