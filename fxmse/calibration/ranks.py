"""Processes that do one thing together: they meet, pass tensors on, and learn what went wrong with one of them.

They talk in two ways. Notes are kept by the group's store and outlive their writer: who is where, and what went wrong.
Tensors travel over connections between the processes, which break when one of them ends, so that the others notice at
once and not only when the time is up.
"""

import collections
import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Alone", "RankError", "Ranks", "Tensors", "check_group", "join"]

Tensors: TypeAlias = Mapping[str, Tensor]
T = TypeVar("T")

_GRACE = timedelta(seconds=10)  # how long one that failed waits for the others to have read why
_ECHO = timedelta(seconds=2)  # how long after a connection broke the reason for it may come
_num_joined: collections.Counter[str] = collections.Counter()


class RankError(RuntimeError):
    """Another rank failed, or does not answer."""


def check_group(group: object) -> "dist.ProcessGroup | None":
    """The process group that ``group`` has to be; None for one that has no other process.

    Raises:
        ValueError: it is none, or this process is not in it.
        RuntimeError: torch was built without what is needed.
    """
    if group is None:
        return None
    if not dist.is_available() or not dist.is_gloo_available():
        raise RuntimeError("this torch was built without torch.distributed or without gloo: expected group=None")
    if not isinstance(group, dist.ProcessGroup) or group.rank() < 0:
        raise ValueError(
            f"group={group!r}: expected a process group that this process is in, such as "
            "torch.distributed.group.WORLD after init_process_group"
        )
    return group if group.size() > 1 else None


class Alone:
    """The one process that works where there is no group, for who would talk to :class:`Ranks`.

    Attributes:
        rank: 0.
        size: 1.
    """

    rank, size = 0, 1

    def __enter__(self) -> "Alone":
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody has to be told."""

    def meet(self, note: object = None) -> list[Any]:
        """The notes of all that are there."""
        return [note]


def join(group: "dist.ProcessGroup | None", timeout: timedelta) -> "Ranks | Alone":
    """The processes of ``group``, or this one."""
    return Alone() if group is None else Ranks(group, timeout)


class Ranks:
    """The processes of a group while they do one thing together, each in a ``with`` block of its own.

    An error in the block is told to the others: they raise :class:`RankError` with its words, at the latest when they
    next have to do with this rank. So they do when its process ends, or does not answer in time.

    Args:
        group: the processes, of any backend: connections of their own are made.
        timeout: how long to wait for the slowest of them.

    Attributes:
        rank: this process's number in the group.
        size: how many there are.
    """

    def __init__(self, group: "dist.ProcessGroup", timeout: timedelta) -> None:
        if timeout <= timedelta(0):
            raise ValueError(f"timeout={timeout}: expected more than 0")
        self.rank, self.size = group.rank(), group.size()
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self._timeout = timeout
        # What is in a store stays there, so that each time has keys of its own.
        _num_joined[group.group_name] += 1
        self._store = dist.PrefixStore(f"fxmse {_num_joined[group.group_name]}", group.get_group_store())
        self._connections: Any = None
        self._num_meetings = 0
        self._lost: list[int] = []

    def __enter__(self) -> "Ranks":
        """Waits for all ranks and connects them."""
        try:
            keys, end = self._announce("joined", None), self._end()
            with self._talking_to(self._others, end, keys):
                self._store.wait(keys, self._timeout)
                store = dist.PrefixStore("connections", self._store)
                self._connections = dist.ProcessGroupGloo(store, self.rank, self.size, self._timeout)
        except RankError as error:
            self._tell(error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Disconnects; tells the others what went wrong here."""
        self._connections = None
        if error is not None:
            self._tell(error)

    def _tell(self, error: BaseException) -> None:
        own = f"rank {self.rank} failed: {type(error).__name__}: {error}"
        failure = str(error) if isinstance(error, RankError) else own
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._store.compare_set("failure", "", json.dumps([failure, self._lost]))
            self._store.set(f"ended/{self.rank}", "")
            if isinstance(error, Exception):
                # The store is often in one of the processes, and ends with it.
                waiting = [f"ended/{rank}" for rank in self._others if rank not in self._lost]
                self._store.wait(waiting, min(self._timeout, _GRACE))

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """``batches``, until another rank has failed."""
        for batch in batches:
            with self._asking_the_store():
                has_failed = self._store.check(["failure"])
            if has_failed:
                raise self._read_failure()
            yield batch

    def meet(self, note: object = None) -> list[Any]:
        """Waits until all ranks are here, and returns their notes in order: whatever JSON can say."""
        keys = self._wait_for_all(note)
        with self._asking_the_store():
            return [json.loads(self._store.get(key)) for key in keys]

    def leave(self) -> None:
        """Waits until all ranks are here; from then on each of them may end, and the store with it."""
        self._wait_for_all()

    def _wait_for_all(self, note: object = None) -> list[str]:
        self._num_meetings += 1
        keys, end = self._announce(f"meeting {self._num_meetings}", note), self._end()
        sent, received = torch.zeros(1), torch.zeros(self.size, 1)
        works: list[tuple[int, Any]] = []
        try:
            for rank in self._others:
                with self._talking_to([rank], end):
                    works.append((rank, self._connections.recv([received[rank]], rank, 0)))
                    works.append((rank, self._connections.send([sent], rank, 0)))
            while works:
                with self._talking_to([works[0][0]], end, keys):
                    works[0][1].wait(timedelta(seconds=max(end - time.monotonic(), 0.001)))  # 0 would mean no limit
                del works[0]
        finally:
            works.clear()  # they keep the connections open, and a traceback would keep them
        return keys

    def _announce(self, place: str, note: object) -> list[str]:
        """Says that this rank is there; returns the keys under which each says so."""
        keys = [f"{place}/{rank}" for rank in range(self.size)]
        with self._asking_the_store():
            self._store.set(keys[self.rank], json.dumps(note))
        return keys

    def _end(self) -> float:
        return time.monotonic() + self._timeout.total_seconds()

    @contextlib.contextmanager
    def _asking_the_store(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError("the process that has the group's store ended: most often, that of rank 0") from error

    @contextlib.contextmanager
    def _talking_to(self, ranks: Sequence[int], end: float, keys: Sequence[str] = ()) -> Iterator[None]:
        """Says what it means that a connection failed.

        Args:
            ranks: the other side.
            end: until when it was waited.
            keys: of :meth:`_announce`; who has not set theirs did not come.
        """
        try:
            yield
        except RuntimeError as error:
            absent = [rank for rank in self._others if keys and not self._has(keys[rank])]
            is_late = time.monotonic() >= end
            raise self._lose(absent if is_late and absent else ranks, is_late=is_late) from error

    def _lose(self, ranks: Sequence[int], *, is_late: bool) -> RankError:
        """What to raise where ranks do not answer: what is known to have gone wrong before, or just that."""
        with contextlib.suppress(RuntimeError):
            self._store.wait(["failure"], _ECHO)
            return self._read_failure()
        self._lost = list(ranks)
        names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        if is_late:
            return RankError(
                f"{names} did not answer within {self._timeout.total_seconds():g} s: the process ended, hangs, or has "
                "so much more to do than the others that it takes a longer timeout"
            )
        return RankError(f"{names} ended without a word: see what that process printed")

    def _read_failure(self) -> RankError:
        with self._asking_the_store():
            failure, self._lost = json.loads(self._store.get("failure"))
        return RankError(failure)

    def _has(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except RuntimeError:
            return False

    def _send(self, tensors: Tensors, rank: int) -> None:
        content = torch.frombuffer(bytearray(safetensors.torch.save(dict(tensors))), dtype=torch.uint8)
        with self._talking_to([rank], self._end()):
            self._connections.send([torch.tensor([len(content)])], rank, 0).wait()
            self._connections.send([content], rank, 0).wait()

    def _receive(self, rank: int) -> Tensors:
        length = torch.zeros(1, dtype=torch.int64)
        with self._talking_to([rank], self._end()):
            self._connections.recv([length], rank, 0).wait()
            content = torch.empty(int(length), dtype=torch.uint8)
            self._connections.recv([content], rank, 0).wait()
        return safetensors.torch.load(content.numpy().tobytes())

    def share(self, tensors: Tensors, root: int) -> Tensors:
        """The tensors of rank ``root``, passed on from rank to rank; a rank's own come back as they are."""
        following = (self.rank + 1) % self.size
        if self.rank != root:
            tensors = self._receive((self.rank - 1) % self.size)
        if following != root:
            self._send(tensors, following)
        return tensors

    def fold(self, tensors: Tensors, merge: Callable[[Tensors, Tensors], Tensors]) -> Tensors:
        """What ``merge`` makes of those of the ranks up to here, in their order: on the last rank, of all."""
        if self.rank > 0:
            tensors = merge(self._receive(self.rank - 1), tensors)
        if self.rank + 1 < self.size:
            self._send(tensors, self.rank + 1)
        return tensors
