"""Numbered items on their way from one producer to its readers: bounded, in order, each used once. Torch-free.

    DIR/00000012         item 12: a file, whole once it has this name
    DIR/position-G-M     the next item that member M of reader group G needs: it is done with all of its own before
    DIR/production.json  `Production`
    DIR/failure          why no more items will come

An item is for one group, and all members of that group read it. Readers write nothing but their positions; only the
producer makes and deletes items. So each item is either there, or done with, or to be made, whoever dies at whatever
moment: a new producer goes on with what is to be made, and new readers in a new folder say where they begin.

The folder is not for longer than its machine is up, so nothing waits for a disk.
"""

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from specforge_core.artifacts import PARTIAL_SUFFIX
from specforge_core.scratch import MEMORY, locked_folder, remove_leftovers

logger = logging.getLogger(__name__)

PREFIX = "specbundle-spool-"
ROOM_SHARE = 0.5
"""Of the free space. What servers hand to the producer takes room in the same place."""
POLL_S = 0.005
SAY_EVERY_S = 30.0
PRODUCTION_NAME = "production.json"
FAILURE_NAME = "failure"


class ProducerFailed(RuntimeError):
    """No more items will come. Why."""


class Production(NamedTuple):
    """What the producer has done so far, in this start."""

    num_tokens: int
    elapsed_s: float
    """Since it began to make its first item."""
    waited_s: float
    """Of that, for room."""

    @property
    def tokens_per_s(self) -> float:
        """While it does not wait."""
        return self.num_tokens / max(self.elapsed_s - self.waited_s, 1e-9)

    def since(self, earlier: "Production") -> "Production":
        """What it has done behind `earlier`; all of it if that was an earlier start."""
        if self.elapsed_s < earlier.elapsed_s:
            return self
        return Production(
            self.num_tokens - earlier.num_tokens, self.elapsed_s - earlier.elapsed_s, self.waited_s - earlier.waited_s
        )


class Order(NamedTuple):
    """Which items are wanted, in the order in which they are."""

    first: int
    """Its number; the others follow without a gap."""
    groups: tuple[int, ...]
    """The group of readers that each item is for."""
    num_members: int
    """Of each group."""

    @property
    def numbers(self) -> range:
        """Of all items."""
        return range(self.first, self.first + len(self.groups))

    def group_of(self, number: int) -> int:
        """Who reads this item."""
        return self.groups[number - self.first]

    def numbers_of(self, group: int) -> list[int]:
        """The items of one group, ascending."""
        return [number for number in self.numbers if self.group_of(number) == group]


class SpoolWriter:
    """The producer's side. One at a time."""

    def __init__(self, directory: Path, order: Order, *, max_bytes: int) -> None:
        """Args: max_bytes: no item is begun while so many lie there; so it holds one item more at most."""
        self._directory, self._order, self._max_bytes = directory, order, max_bytes
        self._sizes: dict[int, int] = {}
        """In bytes, of the items that lie there, ascending."""
        for path in sorted(directory.glob("[0-9]*")):
            self._sizes[int(path.name)] = path.stat().st_size
        self._readers = {(group, member) for group in set(order.groups) for member in range(order.num_members)}
        self._started_at: float | None = None
        self._num_tokens, self._waited_s = 0, 0.0
        self._drop_used()

    def to_make(self) -> list[int]:
        """The items that are neither there nor done with, ascending."""
        needed = self._needed_from()
        return [n for n in self._order.numbers if n not in self._sizes and n >= needed[self._order.group_of(n)]]

    def wait_for_room(self, place: Path | None = None) -> None:
        """Return when an item may be begun.

        Args: place: where it will be written, in this folder. The file of a used item may lie there then, to be
        overwritten: to let go of memory and to get as much again takes longer than to fill it.
        """
        began_at = time.monotonic()
        self._started_at = self._started_at or began_at
        said_at = began_at
        while True:
            for number in self._used():
                if place is not None:
                    self._take(number).rename(place)
                    place = None
                elif self._is_full():
                    self._take(number).unlink()
            if not self._is_full():
                break
            if time.monotonic() - said_at > SAY_EVERY_S:
                said_at = time.monotonic()
                logger.info("%d items wait for the training, which is the slower of the two", len(self._sizes))
            time.sleep(POLL_S)
        self._waited_s += time.monotonic() - began_at

    def add(self, number: int, whole: Path, *, num_tokens: int) -> None:
        """Hand on an item. Args: whole: its file, under another name in this folder."""
        assert self._started_at is not None, "wait for room first"
        self._sizes[number] = whole.stat().st_size
        whole.rename(self._directory / _name(number))
        self._num_tokens += num_tokens
        production = Production(self._num_tokens, time.monotonic() - self._started_at, self._waited_s)
        _replace(self._directory / PRODUCTION_NAME, json.dumps(production._asdict()))

    def wait_until_used(self) -> None:
        """Return when every item is done with, and deleted."""
        while self._sizes:
            time.sleep(POLL_S)
            self._drop_used()

    def _is_full(self) -> bool:
        return sum(self._sizes.values()) >= self._max_bytes

    def _drop_used(self) -> None:
        for number in self._used():
            self._take(number).unlink()

    def _used(self) -> list[int]:
        """The items that lie there and that nobody needs any more, ascending."""
        needed = self._needed_from()
        return [n for n in self._sizes if n not in self._order.numbers or n < needed[self._order.group_of(n)]]

    def _take(self, number: int) -> Path:
        """The file of an item, which does not count any more."""
        del self._sizes[number]
        return self._directory / _name(number)

    def _needed_from(self) -> dict[int, int]:
        """By group, the first item that some member of it is not done with."""
        needed: dict[int, int] = {}
        for group, member in self._readers:
            position = _read_position(self._directory, group, member, self._order.first)
            needed[group] = min(position, needed.get(group, position))
        return needed


class SpoolReader:
    """The side of one member of a group of readers. Its threads may read several items at once."""

    def __init__(self, directory: Path, order: Order, *, group: int, member: int) -> None:
        self._directory, self._position_path = directory, _position_path(directory, group, member)
        self.numbers = order.numbers_of(group)
        """Of the items that it is to read, ascending."""
        self._num_done = 0
        self._done_ahead: set[int] = set()
        self._lock = threading.Lock()

    def wait(self, number: int) -> Path:
        """The item, when it is there. Raises: ProducerFailed."""
        path, failure = self._directory / _name(number), self._directory / FAILURE_NAME
        said_at = time.monotonic()
        while not path.exists():
            if failure.exists():
                raise ProducerFailed(failure.read_text(encoding="utf-8"))
            if time.monotonic() - said_at > SAY_EVERY_S:
                said_at = time.monotonic()
                logger.info("waiting for micro-batch %d: %s", number, self._rate_so_far())
            time.sleep(POLL_S)
        return path

    def done(self, number: int) -> None:
        """Let go of an item: whatever happens to the producer, it is not made again for this reader."""
        with self._lock:
            self._done_ahead.add(number)
            begin = self._num_done
            while self._num_done < len(self.numbers) and self.numbers[self._num_done] in self._done_ahead:
                self._done_ahead.remove(self.numbers[self._num_done])
                self._num_done += 1
            if self._num_done > begin:
                # Not the next of its own, which may be far: behind the last of these, nothing before it is needed.
                _replace(self._position_path, str(self.numbers[self._num_done - 1] + 1))

    def production(self) -> Production | None:
        """What the producer has done; None before its first item."""
        with contextlib.suppress(FileNotFoundError):
            return Production(**json.loads((self._directory / PRODUCTION_NAME).read_text(encoding="utf-8")))
        return None

    def _rate_so_far(self) -> str:
        production = self.production()
        if production is None:
            return "the target has not made its first one yet"
        return f"the target makes {production.tokens_per_s:,.0f} tokens/s and is the slower of the two"


def fail(directory: Path, reason: str) -> None:
    """Tell all readers that no more items will come."""
    _replace(directory / FAILURE_NAME, reason)


@contextlib.contextmanager
def spool_folder(max_bytes: int, *, fallback: Path) -> Iterator[Path]:
    """An empty folder in memory if so much may lie there, else in `fallback`; it goes with the block.

    What a killed run left in memory goes with the next one. Raises: ValueError if there is no room in either.
    """
    fallback.mkdir(parents=True, exist_ok=True)
    parents = [parent for parent in (MEMORY, fallback) if parent.is_dir()]
    for parent in parents:
        remove_leftovers(parent, PREFIX)
    free = {parent: int(ROOM_SHARE * shutil.disk_usage(parent).free) for parent in parents}
    roomy = [parent for parent in parents if free[parent] >= max_bytes]
    if not roomy:
        rooms = ", ".join(f"{parent} has {free_bytes / 2**30:.1f}" for parent, free_bytes in free.items())
        raise ValueError(
            f"features.buffer_gib={max_bytes / 2**30:g} does not fit: of the free space half may be used, and "
            f"{rooms} GiB of that; lower it, or make room"
        )
    with locked_folder(roomy[0], PREFIX) as folder:
        yield folder


def _name(number: int) -> str:
    return f"{number:08d}"


def _position_path(directory: Path, group: int, member: int) -> Path:
    return directory / f"position-{group}-{member}"


def _read_position(directory: Path, group: int, member: int, first: int) -> int:
    """Before the first item is done with there is no position."""
    with contextlib.suppress(FileNotFoundError):
        return int(_position_path(directory, group, member).read_text(encoding="utf-8"))
    return first


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content. It may be lost with the machine."""
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
