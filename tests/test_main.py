"""The process of a stage: what it says, and the status that it ends with."""

import json
import sys
from pathlib import Path
from traceback import StackSummary
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from specforge_core import __main__ as stage_process
from tests.data.scripted_target import make_spec


def write_to_a_full_disk() -> None:
    with Path("/dev/full").open("w") as file:
        file.write("x")


def save_to_a_full_disk() -> None:
    """As DCP does, which wraps the error in one of its own that is no Exception."""
    try:
        write_to_a_full_disk()
    except OSError as error:
        raise CheckpointException("writing", {0: (error, StackSummary())}) from None


def cache_on_a_full_disk() -> None:
    """As `datasets` does."""
    try:
        write_to_a_full_disk()
    except OSError as error:
        raise RuntimeError("an error occurred while generating the dataset") from error


def run(work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a stage that does this work."""
    module = ModuleType("made_stage")
    module.main = lambda spec, out: work()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_stage", module)
    monkeypatch.setitem(stage_process.MODULES, "regenerate", "made_stage")
    (tmp_path / "spec.json").write_text(make_spec(tmp_path / "prompts.jsonl").model_dump_json())
    return stage_process.main(["regenerate", "--spec", str(tmp_path / "spec.json"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("work", [write_to_a_full_disk, save_to_a_full_disk, cache_on_a_full_disk])
def test_a_full_disk_is_told_last_with_its_way_out_and_not_tried_again(
    work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(work, tmp_path, monkeypatch) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("ValueError: a disk is full: ")
    assert "[Errno 28] No space left on device; " in last
    assert f"MiB are free where {tmp_path / 'out'} lies" in last
    assert "--store" in last


def test_a_disk_may_be_full_when_all_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def seal(*arguments: Any, **options: Any) -> None:
        write_to_a_full_disk()

    monkeypatch.setattr(stage_process, "seal", seal)
    assert run(lambda: None, tmp_path, monkeypatch) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("ValueError: a disk is full: ")


def test_torchrun_is_told_of_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert run(save_to_a_full_disk, tmp_path, monkeypatch) == 2
    assert "a disk is full" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_any_other_error_of_the_machine_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        (tmp_path / "missing").read_text()

    with pytest.raises(FileNotFoundError):
        run(fail, tmp_path, monkeypatch)
