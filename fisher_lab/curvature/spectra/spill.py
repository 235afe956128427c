"""Where chunks wait until the Gram matrix is formed: in memory, or in an unnamed temporary file.

The file has no name, so that a crash leaves nothing behind, and it is read by explicit calls, so
that the resident memory does not grow with ``N`` (pages of a memory-mapped file would count).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.curvature.collectives import dtype_name

TILE_BYTES = 64 * 2**20
"""Bytes of a float64 column tile, and of a group of factored rows, that are in memory at once."""


class Bytes(Protocol):
    """Somewhere to put tensors by offset; a caller may bring its own (``spill``)."""

    def write(self, offset: int, tensor: Tensor) -> None:
        """Stores the tensor's bytes at an offset."""
        ...

    def read(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns a tensor on the host from the bytes at an offset."""
        ...

    def close(self) -> None:
        """Gives the space back."""
        ...


class MemoryBytes(Bytes):
    """Keeps the bytes in memory."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    @override
    def write(self, offset: int, tensor: Tensor) -> None:
        # A copy, so that the chunk can be freed.
        self._kept[offset] = tensor.detach().cpu().clone()

    @override
    def read(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        wanted, pieces = prod(shape), []
        while wanted > 0:
            piece = self._kept[offset].reshape(-1)
            pieces.append(piece)
            wanted -= piece.numel()
            offset += piece.numel() * piece.element_size()
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return joined.reshape(shape)

    @override
    def close(self) -> None:
        self._kept.clear()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor on the host; works for every dtype."""
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


class FileBytes(Bytes):
    """Keeps the bytes in an unnamed file in the system's directory for temporary files."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed in close)

    @override
    def write(self, offset: int, tensor: Tensor) -> None:
        self._file.seek(offset)
        view = _bytes_of(tensor.detach().cpu().contiguous())
        while view:
            view = view[self._file.write(view) :]

    @override
    def read(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        view = _bytes_of(out)
        self._file.seek(offset)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise OSError("spilled gradients: the temporary file ended early")
            view = view[count:]
        return out

    @override
    def close(self) -> None:
        self._file.close()


class DenseRows:
    """Rows of one block, ``[N, P]``, laid out by column tiles so that each tile is one read.

    Args:
        space: where the bytes go.
        n: rows, ``N``; on several ranks this rank's.
        p: columns, ``P``.
        dtype: of the rows; that of what is written goes before it.
        longest: rows of the rank that has most, so that all ranks have the same tiles.
    """

    def __init__(self, space: Bytes, n: int, p: int, dtype: torch.dtype, longest: int) -> None:
        self._space = space
        self.n, self.p, self._dtype = n, p, dtype
        self.width = max(1, min(p, TILE_BYTES // (8 * max(longest, 1))))

    def write(self, first: int, rows: Tensor) -> None:
        """Puts ``rows`` ``[c, P]`` at row ``first``."""
        self._dtype = rows.dtype
        size = rows.element_size()
        for start in range(0, self.p, self.width):
            tile = rows[:, start : start + self.width]
            self._space.write((self.n * start + first * tile.shape[1]) * size, tile)

    def tiles(self) -> Iterator[Tensor]:
        """Yields the column tiles ``[N, w]`` in float64."""
        for tile in self.stored():
            yield tile.to(torch.float64)

    def stored(self) -> Iterator[Tensor]:
        """Yields the column tiles ``[N, w]`` as they are stored."""
        size = torch.empty(0, dtype=self._dtype).element_size()
        for start in range(0, self.p, self.width):
            shape = (self.n, min(self.width, self.p - start))
            if self.n == 0:
                yield torch.empty(shape, dtype=self._dtype)
            else:
                yield self._space.read(self.n * start * size, shape, self._dtype)

    def close(self) -> None:
        """Gives the space back."""
        self._space.close()


@dataclass(frozen=True)
class _Piece:
    first: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    sequence: int


class FactoredRows:
    """Rows of one weight as products: inputs in memory (``T in``), output gradients in a space.

    Args:
        space: where the output gradients go.
    """

    def __init__(self, space: Bytes) -> None:
        self._space = space
        self._pieces: list[_Piece] = []
        self._inputs: dict[int, Tensor] = {}
        self._end = 0

    def write(self, first: int, sequence: int, inputs: Tensor, outputs: Tensor) -> None:
        """Adds rows ``[c, S, out]``; chunks of a sequence join into pieces up to ``TILE_BYTES``.

        Args:
            first: index of the first row.
            sequence: what says which chunks share their inputs.
            inputs: ``[S, in]``.
            outputs: ``[c, S, out]``.
        """
        if sequence not in self._inputs:
            self._inputs[sequence] = inputs.detach().cpu().clone()
        self._space.write(self._end, outputs)
        piece = _Piece(
            first, self._end, tuple(outputs.shape), dtype=outputs.dtype, sequence=sequence
        )
        self._end += outputs.numel() * outputs.element_size()
        last = self._pieces[-1] if self._pieces else None
        if last is not None and last.sequence == sequence:
            joined = (last.shape[0] + piece.shape[0], *last.shape[1:])
            if prod(joined) * 8 <= TILE_BYTES:
                self._pieces[-1] = replace(last, shape=joined)
                return
        self._pieces.append(piece)

    def __len__(self) -> int:
        return len(self._pieces)

    def piece(self, i: int) -> tuple[int, Tensor, Tensor]:
        """Returns (first row, inputs ``[S, in]``, outputs ``[c, S, out]``) in float64."""
        first, inputs, outputs = self.stored(i)
        return first, inputs.double(), outputs.double()

    def stored(self, i: int) -> tuple[int, Tensor, Tensor]:
        """Returns what :meth:`piece` does, as it is stored."""
        piece = self._pieces[i]
        outputs = self._space.read(piece.offset, piece.shape, piece.dtype)
        return piece.first, self._inputs[piece.sequence], outputs

    def described(self) -> list[dict[str, Any]]:
        """Returns first row, shapes and dtypes of every piece as plain values, for other ranks."""

        def like(tensor: Tensor) -> list[Any]:
            return [list(tensor.shape), dtype_name(tensor.dtype)]

        return [
            {
                "first": piece.first,
                "like": [
                    like(self._inputs[piece.sequence]),
                    [list(piece.shape), dtype_name(piece.dtype)],
                ],
            }
            for piece in self._pieces
        ]

    def close(self) -> None:
        """Gives the space back."""
        self._space.close()
