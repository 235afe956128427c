"""Where chunks wait until the Gram matrix is formed: in memory, or in an unnamed temporary file.

The file has no name, so that a crash leaves nothing behind, and it is read by explicit calls, so
that the resident memory does not grow with ``N`` (pages of a memory-mapped file would count).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import IO, Any

import torch
from torch import Tensor

from fisher_lab.curvature.collectives import dtype_name

TILE_BYTES = 64 * 2**20
"""Bytes of a float64 column tile, and of a group of factored rows, that are in memory at once."""


class FileBytes:
    """Keeps tensors by offset in a file.

    Args:
        file: None for an unnamed one in the system's directory for temporary files; an
            ``io.BytesIO`` keeps the bytes in memory.
    """

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self._file: Any = file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (see close)

    def write(self, offset: int, tensor: Tensor) -> None:
        """Stores the tensor's bytes at an offset."""
        self._file.seek(offset)
        view = _bytes_of(tensor.detach().cpu().contiguous())
        while view:
            view = view[self._file.write(view) :]

    def read(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns a tensor on the host from the bytes at an offset."""
        out = torch.empty(shape, dtype=dtype)
        view = _bytes_of(out)
        self._file.seek(offset)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise OSError("spilled gradients: the temporary file ended early")
            view = view[count:]
        return out

    def close(self) -> None:
        """Gives the space back."""
        self._file.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor on the host; works for every dtype."""
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


class DenseRows:
    """Rows of one block, ``[N, P]``, laid out by column tiles so that each tile is one read.

    Args:
        space: where the bytes go.
        n: rows, ``N``; on several ranks this rank's.
        p: columns, ``P``.
        dtype: of the rows; that of what is written goes before it.
        longest: rows of the rank that has most, so that all ranks have the same tiles.
    """

    def __init__(self, space: FileBytes, n: int, p: int, dtype: torch.dtype, longest: int) -> None:
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
        """Yields the column tiles ``[N, w]`` as they are stored."""
        size = self._dtype.itemsize
        for start in range(0, self.p, self.width):
            shape = (self.n, min(self.width, self.p - start))
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
    """Rows of one weight as products: inputs in memory (``T in``), output gradients in a space."""

    def __init__(self, space: FileBytes) -> None:
        self._space = space
        self._pieces: list[_Piece] = []
        self._inputs: dict[int, Tensor] = {}
        self._end = 0

    def write(self, first: int, sequence: int, inputs: Tensor, outputs: Tensor) -> None:
        """Adds rows from ``first`` on; those of a sequence share their inputs ``[S, in]``.

        Outputs are ``[c, S, out]``; chunks of a sequence join into pieces up to ``TILE_BYTES``.
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
        """Returns (first row, inputs ``[S, in]``, outputs ``[c, S, out]``) as they are stored."""
        piece = self._pieces[i]
        outputs = self._space.read(piece.offset, piece.shape, piece.dtype)
        return piece.first, self._inputs[piece.sequence], outputs

    def described(self) -> list[tuple[int, list[tuple[list[int], str]]]]:
        """Returns first row, shapes and dtypes of every piece, for ranks that do not have it."""
        found = []
        for piece in self._pieces:
            inputs = self._inputs[piece.sequence]
            like = ((inputs.shape, inputs.dtype), (piece.shape, piece.dtype))
            found.append((piece.first, [(list(s), dtype_name(dtype)) for s, dtype in like]))
        return found

    def close(self) -> None:
        """Gives the space back."""
        self._space.close()
