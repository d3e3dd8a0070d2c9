"""Where hidden states are handed over, and what is in flight."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from specforge_core.benchmark.client import Job, Outcome, Reply, RequestRefused
from specforge_core.targets import CaptureRequest, TargetFeatures, handover
from specforge_core.targets.handover import FilesLost, Handover, Layout, Traffic, captured
from tests.processes import start

LAYOUT = Layout((1, 3, 4), 64, torch.bfloat16)
TOKEN_BYTES = (3 + 1) * 64 * 2 + 4 + 4
TRAFFIC = Traffic(max_document_tokens=100, batch_tokens=400, num_servers=2)
BEST = 6 * 2 * 400
"""Tokens in flight: six forwards of each server. One more of each and of five batches are held beside them."""
Usage = namedtuple("Usage", "free")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setattr(handover, "MEMORY", memory)
    return memory, disk


@pytest.mark.parametrize(
    ("memory_tokens", "disk_tokens", "in_memory", "in_flight"),
    [
        (BEST + 7 * 400, 0, True, BEST),
        (BEST + 7 * 400 - 1, BEST + 7 * 400, False, BEST),
        (BEST + 7 * 400 - 1, BEST + 7 * 400 - 1, True, BEST // 2),
        # No forward has more tokens than are in flight.
        (8 * 100, 8 * 150, False, 150),
        (8 * 100, 0, True, 100),
    ],
)
def test_files_lie_in_memory_if_there_is_room_and_are_fewer_where_there_is_little(
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    memory_tokens: int,
    disk_tokens: int,
    in_memory: bool,
    in_flight: int,
) -> None:
    room = dict(zip(folders, (memory_tokens, disk_tokens), strict=True))
    # A fifth of the room is left to others. One byte more, for the division.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(int(room[path] * TOKEN_BYTES / 0.8) + 1))
    with Handover(LAYOUT, TRAFFIC, fallback=folders[1]) as opened:
        assert opened.in_flight_tokens == in_flight
        assert [bool(list(folder.iterdir())) for folder in folders] == [in_memory, not in_memory]
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_a_document_without_room_anywhere_is_refused_with_the_numbers(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**28))
    layout, traffic = Layout((1, 3, 4), 8192, torch.bfloat16), Traffic(8192, 8192, 1)
    # Seven forwards of 8,192 tokens with 4 x 8,192 values of bf16 each.
    message = (
        r"take 3.50 GiB on their way, but .*memory has 0.20 GiB, .*disk has 0.20 GiB to use: .*max_document_tokens"
    )
    with (
        pytest.raises(ValueError, match=message),
        Handover(layout, traffic, fallback=folders[1]),
    ):
        pass


def enter_and_die(memory: Path, disk: Path) -> None:
    handover.MEMORY = memory
    with Handover(LAYOUT, TRAFFIC, fallback=disk):
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_killed_runs_left_is_removed_and_what_others_use_is_not(folders: tuple[Path, Path]) -> None:
    memory, disk = folders
    start(enter_and_die, memory, disk).join()
    (left,) = memory.iterdir()
    with Handover(LAYOUT, TRAFFIC, fallback=disk) as first:
        assert not left.exists()
        with Handover(LAYOUT, TRAFFIC, fallback=disk):
            assert first._folder.exists()
            assert len(list(memory.iterdir())) == 2
    assert list(memory.iterdir()) == []


def test_a_server_gets_the_hook_and_nothing_else_of_this_package(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/the/server")
    with Handover(LAYOUT, TRAFFIC, fallback=folders[1]) as opened:
        hook, *others = opened.environment["PYTHONPATH"].split(os.pathsep)
        assert others == ["/of/the/server"]
        assert [path.name for path in Path(hook).iterdir()] == ["sglang_hook.py"]
        specs = json.loads(opened.hooks_option())
        program = "import sglang_hook; sglang_hook.layer_hook; sglang_hook.forward_hook"
        subprocess.run([sys.executable, "-P", "-c", program], env=opened.environment, check=True, cwd="/")
    assert [spec["hook_factory"] for spec in specs] == ["sglang_hook:layer_hook"] * 3 + ["sglang_hook:forward_hook"]
    assert [spec["config"].get("layer") for spec in specs] == [1, 3, 4, None]


class Answered:
    """In place of `completed` and of the files: answers requests in an order of its own, and loses some files."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, lost: Sequence[str] = (), refused: str | None = None
    ) -> None:
        self.lost, self.refused = set(lost), refused
        self.sent: list[str] = []
        self.peak_tokens = self.tokens = 0
        monkeypatch.setattr(handover, "completed", self.completed)
        monkeypatch.setattr(Handover, "collect", lambda _, rid: self.collect(rid))

    def completed(self, servers: object, jobs: Iterator[Job], *, max_in_flight: int) -> Iterator[Outcome]:
        in_flight: list[Job] = []
        while True:
            while (job := next(jobs, None)) is not None:
                in_flight.append(job)
                self.sent.append(job.rid)
                self.tokens += len(job.input_ids)
                self.peak_tokens = max(self.peak_tokens, self.tokens)
            if not in_flight:
                return
            # The youngest first: as far from the order of the documents as can be.
            job = in_flight.pop()
            if self.refused and self.refused in job.rid:
                yield Outcome(job, RequestRefused("no"))
            else:
                yield Outcome(job, Reply((), "length", {"id": job.rid, "prompt_tokens": len(job.input_ids)}, 0.0))

    def collect(self, rid: str) -> TargetFeatures:
        if rid in self.lost:
            raise FilesLost(rid)
        _, document, num_tokens, _ = rid.split("-")
        self.tokens -= int(num_tokens) * (1 + rid.count("#lost"))
        empty = torch.empty(0)
        return TargetFeatures(torch.empty(int(num_tokens)), empty, empty, torch.tensor([int(document)]))


def requests(lengths: Sequence[int]) -> list[CaptureRequest]:
    return [CaptureRequest(torch.arange(n), torch.zeros(n, dtype=torch.bool)) for n in lengths]


def order(features: Iterator[TargetFeatures]) -> list[int]:
    return [int(one.logsumexp_U) for one in features]


@pytest.fixture
def opened(folders: tuple[Path, Path]) -> Iterator[Handover]:
    with Handover(LAYOUT, TRAFFIC, fallback=folders[1]) as one:
        one.in_flight_tokens = 100
        yield one


def test_documents_come_in_order_and_no_more_tokens_than_fit_are_in_flight(
    opened: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Answered(monkeypatch)
    lengths = [30, 40, 30, 1, 90, 100, 5, 5, 60, 31]
    assert order(captured(opened, [object()], requests(lengths))) == list(range(10))  # type: ignore[list-item]
    # The first three, and the one of 100 alone.
    assert server.peak_tokens == 100


def test_a_document_whose_files_are_lost_is_sent_again_some_times(
    opened: Handover, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Answered(monkeypatch, lost=["capture-1-40-", "capture-1-40-#lost"])
    with caplog.at_level(logging.WARNING):
        assert order(captured(opened, [object()], requests([30, 40, 20]))) == [0, 1, 2]  # type: ignore[list-item]
    assert [rid for rid in server.sent if "-1-" in rid] == [f"capture-1-40-{'#lost' * n}" for n in range(3)]
    assert caplog.text.count("sending it again") == 2
    Answered(monkeypatch, lost=[f"capture-3-40-{'#lost' * n}" for n in range(4)])
    with pytest.raises(FilesLost):
        order(captured(opened, [object()], requests([40])))  # type: ignore[list-item]


def test_a_refused_document_ends_the_capture(opened: Handover, monkeypatch: pytest.MonkeyPatch) -> None:
    Answered(monkeypatch, refused="-1-")
    with pytest.raises(RequestRefused):
        order(captured(opened, [object()], requests([3, 4, 5])))  # type: ignore[list-item]
