"""What the engines need of the other ranks, for one process and for ``torch.distributed``.

The mathematics of several ranks (``docs/math.md``, section 7) is written against
:class:`Communicator`. :class:`Alone` is its implementation for one process,
:class:`TorchCommunicator` that for a process group. Every method is collective: all ranks call
it, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import timedelta
from time import perf_counter
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from fisher_lab.curvature.errors import CurvatureError, RankError


class Communicator(Protocol):
    """Moves tensors between ranks.

    Attributes:
        rank: this rank, from 0.
        size: number of ranks.
    """

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Returns the sum of ``x`` over the ranks; ``x`` itself may hold it afterwards."""
        ...

    def all_gather(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns the ranks' ``x`` one under the other, in the order of the ranks.

        ``x`` is ``[rows[rank], ...]``; ``rows`` says what each rank brings, and the remaining
        dimensions are alike.
        """
        ...

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Sends consecutive pieces of a flat tensor ``[sum(sent)]`` to the ranks (all-to-all).

        ``sent`` are the elements for each rank, ``received`` those from each rank. Returns
        ``[sum(received)]``, in the order of the ranks.
        """
        ...

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """Returns ``source``'s ``x``; the other ranks bring a tensor of the same shape."""
        ...

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Returns the JSON-able values of all ranks, in the order of the ranks."""
        ...


class Alone(Communicator):
    """One process: everything is at hand already."""

    rank = 0
    size = 1

    @override
    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    @override
    def all_gather(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        return x

    @override
    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return x

    @override
    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return x

    @override
    def all_gather_objects(self, value: Any) -> list[Any]:
        return [value]


def slice_of_rank(length: int, rank: int, size: int) -> slice:
    """Returns a rank's slice of ``range(length)``: contiguous, sizes differ by one at most."""
    base, more = divmod(length, size)
    start = rank * base + min(rank, more)
    return slice(start, start + base + int(rank < more))


def slice_sizes(length: int, size: int) -> list[int]:
    """Returns the sizes of all ranks' slices of ``range(length)``."""
    return [len(range(length)[slice_of_rank(length, rank, size)]) for rank in range(size)]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``float32`` for ``torch.float32``, to be sent to other ranks."""
    return str(dtype).removeprefix("torch.")


def together(communicator: Communicator, step: Callable[[], None]) -> None:
    """Does a step on every rank; an error of one is raised on all, so that none waits in vain.

    ``step`` is what this rank does by itself, without collectives.

    Raises:
        RankError: another rank has an error; names the rank.
        Exception: this rank's own.
    """
    if communicator.size == 1:
        step()
        return
    try:
        step()
    except Exception as error:
        communicator.all_gather_objects(f"{type(error).__name__}: {error}")
        raise
    raise_others(communicator.all_gather_objects(None))


def raise_others(errors: Sequence[str | None]) -> None:
    """Raises a :class:`RankError` that names the first rank that has sent an error."""
    for rank, text in enumerate(errors):
        if text is not None:
            raise RankError(f"rank {rank}: {text}")


def same_everywhere(communicator: Communicator, what: str, value: Any) -> None:
    """Checks that all ranks bring the same JSON-able value.

    Raises:
        CurvatureError: they do not; names the ranks and both values.
    """
    if communicator.size == 1:
        return
    found = communicator.all_gather_objects(value)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise CurvatureError(
                f"{what}: rank 0 has {found[0]!r}, rank {rank} has {other!r}; allowed: the same "
                "on all ranks"
            )


@dataclass(frozen=True)
class Spread:
    """Tokens or samples of which every rank of a communicator holds its own ``rows``."""

    communicator: Communicator
    rows: tuple[int, ...]

    def gather(self, x: Tensor) -> Tensor:
        """Returns the rows of all ranks, ``[T, ...]``; collective."""
        return self.communicator.all_gather(x, self.rows)


def rank_seed(seed: int, rank: int) -> int:
    """Returns the seed of a rank's own draws: rank 0 draws what one process draws."""
    return (seed + rank * 0x9E3779B1) % 2**63


def exchange_tokens_for_outputs(
    x: Tensor, rows: Sequence[int], communicator: Communicator
) -> Tensor:
    """Exchanges a rank's rows of all columns for all rows of its slice of the columns.

    ``x`` is ``[rows[rank], out]``, such as tokens by outputs; returns ``[sum(rows), out_r]``.
    """
    if communicator.size == 1:
        return x
    widths = slice_sizes(x.shape[1], communicator.size)
    mine = widths[communicator.rank]
    flat = torch.cat([piece.reshape(-1) for piece in x.split(widths, dim=1)])
    sent = [len(x) * width for width in widths]
    received = [n * mine for n in rows]
    return communicator.exchange(flat, sent, received).view(sum(rows), mine)


def chosen_rows(
    x: Tensor, rows: Sequence[int], chosen: Tensor, communicator: Communicator
) -> tuple[Tensor, list[int]]:
    """Returns which of the rows that are chosen among those of all ranks are this rank's.

    ``x`` are this rank's rows, ``rows`` says how many each rank has, and ``chosen`` are ascending
    indices into the rows of all ranks. Returns this rank's chosen rows, and how many each rank has.
    """
    bounds = torch.tensor([0, *rows]).cumsum(0)
    of_rank = torch.bucketize(chosen, bounds, right=True) - 1
    mine = chosen[of_rank == communicator.rank] - bounds[communicator.rank]
    return x[mine.to(x.device)], of_rank.bincount(minlength=len(rows)).tolist()


Progress = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""``progress(items, label, total)`` yields the items; how it shows them is the caller's affair."""


def no_progress(items: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
    """Shows nothing."""
    return items


def progress_bars(items: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
    """Shows a bar where the output is a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=label, total=total, leave=False, disable=None)


class CommunicationError(CurvatureError):
    """A collective failed or took too long; names it, its size and the rank."""


@dataclass
class Traffic:
    """What one collective has moved on this rank.

    Bytes are those of the usual algorithms: a ring for all-reduce (``2 (R-1)/R`` of the tensor
    sent and as much received) and all-gather (``R-1`` padded pieces each way), pairs for the
    exchange (everything but the own piece), a flat tree for the broadcast.

    Attributes:
        calls: how often.
        sent: bytes sent by this rank.
        received: bytes received by this rank.
        seconds: spent in it, waiting for other ranks included.
    """

    calls: int = 0
    sent: int = 0
    received: int = 0
    seconds: float = 0.0


class TorchCommunicator(Communicator):
    """Collectives of one process group (None: the default one), counted.

    Attributes:
        traffic: name of a collective -> what it has moved.
        patience: how long a collective is waited for where the backend would go on by itself
            (nccl); None leaves the time-out to the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise RuntimeError("several ranks need a process group: call init_process_group first")
        self.group: dist.ProcessGroup = group
        self.traffic: dict[str, Traffic] = {}
        self.patience: timedelta | None = None
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        nccl = "nccl" in dist.get_backend(self.group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else _CPU

    def __deepcopy__(self, _memo: object) -> Self:
        return self  # a group of processes has no copy

    def __reduce__(self) -> tuple[type[TorchCommunicator], tuple[()]]:
        if self.group is not dist.group.WORLD:
            raise TypeError("a communicator of a part of the ranks cannot be pickled")
        return TorchCommunicator, ()

    # ---- collectives -------------------------------------------------------------------------

    @override
    def all_reduce(self, x: Tensor) -> Tensor:
        here = x.to(self.device).contiguous()
        moved = 2 * (self.size - 1) * here.nbytes // self.size
        with self._counted("all_reduce", here, moved, moved):
            self._finish(dist.all_reduce(here, group=self.group, async_op=True))
        return here.to(x.device)

    @override
    def all_gather(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        if len(rows) != self.size or x.shape[0] != rows[self.rank]:
            raise ValueError(f"all_gather: {x.shape[0]} rows on rank {self.rank}, expected {rows}")
        longest = max(rows)
        piece = x.to(self.device).contiguous()
        if piece.shape[0] < longest:
            padded = piece.new_zeros(longest, *piece.shape[1:])
            padded[: piece.shape[0]] = piece
            piece = padded
        if piece.numel() == 0:
            return x.new_empty(sum(rows), *x.shape[1:])
        every = piece.new_empty(self.size * longest, *piece.shape[1:])
        moved = (self.size - 1) * piece.nbytes
        with self._counted("all_gather", piece, moved, moved):
            self._finish(
                _gather_into(_as_bytes(every), _as_bytes(piece), group=self.group, async_op=True)
            )
        if any(n != longest for n in rows):
            pieces = every.view(self.size, longest, *piece.shape[1:])
            every = torch.cat([pieces[r, :n] for r, n in enumerate(rows)])
        return every.to(x.device)

    @override
    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        here = x.to(self.device).contiguous()
        result = here.new_empty(sum(received))
        size, own = here.element_size(), self.rank
        going = (sum(sent) - sent[own]) * size
        coming = (sum(received) - received[own]) * size
        with self._counted("exchange", here, going, coming):
            self._finish(
                dist.all_to_all_single(
                    _as_bytes(result),
                    _as_bytes(here),
                    [n * size for n in received],
                    [n * size for n in sent],
                    group=self.group,
                    async_op=True,
                )
            )
        return result.to(x.device)

    @override
    def broadcast(self, x: Tensor, source: int) -> Tensor:
        here = x.to(self.device).contiguous()
        if here.numel() == 0:
            return x
        root = source == self.rank
        sent = (self.size - 1) * here.nbytes if root else 0
        with self._counted("broadcast", here, sent, 0 if root else here.nbytes):
            peer = dist.get_global_rank(self.group, source)  # type: ignore[arg-type]
            self._finish(dist.broadcast(_as_bytes(here), peer, group=self.group, async_op=True))
        return here.to(x.device)

    @override
    def all_gather_objects(self, value: Any) -> list[Any]:
        text = json.dumps(value).encode()
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor([len(text)]), [1] * self.size).tolist()
        every = self.all_gather(data, sizes).cpu().numpy().tobytes()
        result, start = [], 0
        for size in sizes:
            result.append(json.loads(every[start : start + size]))
            start += size
        return result

    def _finish(self, work: Any) -> None:
        """Waits for a collective that was started with ``async_op=True``.

        Without it, newer versions of torch put an nccl collective on the stream and return no
        work: a time-out is then the watchdog's, which ends the process and names nothing.
        """
        if work is None:
            return
        if self.patience is None:
            work.wait()
        else:
            work.wait(self.patience)

    # ---- counting ----------------------------------------------------------------------------

    @contextmanager
    def _counted(self, name: str, x: Tensor, sent: int, received: int) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise CommunicationError(
                f"rank {self.rank} of {self.size}: {name} of {dtype_name(x.dtype)}"
                f"{list(x.shape)} failed after {perf_counter() - start:.1f} s ({reason}); another "
                "rank has ended, is stuck, or calls something else"
            ) from error
        entry = self.traffic.setdefault(name, Traffic())
        entry.calls += 1
        entry.sent += sent
        entry.received += received
        entry.seconds += perf_counter() - start

    def reset(self) -> None:
        """Sets all counters to zero."""
        self.traffic = {}

    def totals(self) -> Traffic:
        """Returns the sum over the collectives."""
        every = [astuple(entry) for entry in self.traffic.values()]
        return Traffic(*map(sum, zip(*every, strict=True)))


_CPU = torch.device("cpu")
# Renamed in torch 2.13.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _as_bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


_WORLD: dict[int, TorchCommunicator] = {}


def world() -> TorchCommunicator | None:
    """Returns the communicator of the default process group; None on a single rank.

    It is one and the same as long as the group lives, so that its counters add up.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    group = dist.group.WORLD
    found = _WORLD.get(id(group))
    if found is None:
        _WORLD.clear()
        found = _WORLD[id(group)] = TorchCommunicator(group)
    return found
