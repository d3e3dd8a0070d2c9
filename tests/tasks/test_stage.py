"""From a spec to a stored artifact, through real child processes."""

import os
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from specforge_core.artifacts import LOG_NAME, SPEC_NAME
from specforge_core.gpus import lease_devices
from specforge_core.launch import stage_command, stage_environment
from specforge_core.ledger import load_entry_record
from specforge_core.process import ProcessError, children_end_on_error
from tasks import stage as stage_module
from tasks.stage import CPU_SLOT, MIRROR_VARIABLE, EntryBuild, StageError, run_stage
from tests.builds import entry_build
from tests.tasks.echo import EchoSpec, echo_command


@pytest.fixture(autouse=True)
def _echo_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "stage_command", echo_command)
    monkeypatch.setattr(stage_module, "device_lock_dir", lambda: tmp_path / "devices")
    monkeypatch.delenv(MIRROR_VARIABLE, raising=False)


@pytest.fixture
def build(tmp_path: Path) -> EntryBuild:
    return entry_build(tmp_path / "store")


def test_a_stage_builds_once_and_is_reused_from_then_on(build: EntryBuild) -> None:
    first = run_stage(EchoSpec(text="hello"), build)
    second = run_stage(EchoSpec(text="hello"), build)
    assert not first.is_reused
    assert second.is_reused
    assert first.artifact == second.artifact
    assert (first.artifact.path / "echo.txt").read_text() == "hello"
    assert "hearing hello\n" in (first.artifact.path / LOG_NAME).read_text()
    assert EchoSpec.model_validate_json((first.artifact.path / SPEC_NAME).read_text()) == EchoSpec(text="hello")
    assert load_entry_record(build.store, "demo").keys == {"echo": first.artifact.key}


def test_another_text_is_another_artifact(build: EntryBuild) -> None:
    keys = {run_stage(EchoSpec(text=text), build).artifact.key for text in ("hello", "goodbye")}
    assert len(keys) == 2


def test_an_artifact_with_a_lost_file_is_built_again(build: EntryBuild) -> None:
    artifact = run_stage(EchoSpec(text="hello"), build).artifact
    (artifact.path / "echo.txt").unlink()
    again = run_stage(EchoSpec(text="hello"), build)
    assert not again.is_reused
    assert (again.artifact.path / "echo.txt").read_text() == "hello"


def test_what_is_measured_and_published_is_read_before_it_is_reused(
    build: EntryBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = run_stage(EchoSpec(text="hello"), build).artifact
    (artifact.path / "echo.txt").write_text("jello")
    assert run_stage(EchoSpec(text="hello"), build).is_reused
    monkeypatch.setattr(stage_module, "READ_BEFORE_REUSE", {"echo"})
    again = run_stage(EchoSpec(text="hello"), build)
    assert not again.is_reused
    assert (again.artifact.path / "echo.txt").read_text() == "hello"


def test_a_failing_stage_says_what_it_said_last_and_where_all_of_it_is(build: EntryBuild) -> None:
    with pytest.raises(StageError, match="out of breath") as caught:
        run_stage(EchoSpec(text="hello", behaviour="fail"), build)
    assert caught.value.status == 1
    log = build.store / "echo" / f".building-{EchoSpec(text='hello').key()}" / LOG_NAME
    assert str(log) in str(caught.value)
    assert log.read_text().endswith("out of breath\n")


def test_what_a_failed_try_left_is_there_for_the_next(build: EntryBuild) -> None:
    spec = EchoSpec(text="hello", behaviour="fail once")
    with pytest.raises(StageError):
        run_stage(spec, build)
    assert not run_stage(spec, build).is_reused


def test_two_builds_of_one_artifact_build_it_once(build: EntryBuild) -> None:
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(run_stage(EchoSpec(text="hello"), build))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0].artifact == results[1].artifact
    assert sorted(result.is_reused for result in results) == [False, True]
    assert (results[0].artifact.path / LOG_NAME).read_text().count("hearing hello") == 1


def test_a_cpu_stage_waits_for_the_cpu(build: EntryBuild, tmp_path: Path) -> None:
    def build_it() -> None:
        run_stage(EchoSpec(text="hello"), build)

    thread = threading.Thread(target=build_it)
    with lease_devices(1, devices=(CPU_SLOT,), lock_dir=tmp_path / "devices" / "cpu"):
        thread.start()
        thread.join(1)
        assert thread.is_alive()
        assert not list((build.store / "echo").glob(f".building-*/{LOG_NAME}"))
    thread.join(30)
    assert not thread.is_alive()


def test_a_gpu_stage_sees_the_gpus_that_it_leased_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def print_devices(spec: EchoSpec, spec_path: Path, out: Path) -> list[str]:
        return [
            sys.executable,
            "-c",
            "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES']); raise SystemExit(1)",
        ]

    monkeypatch.setattr(stage_module, "stage_command", print_devices)
    build = entry_build(tmp_path / "store", num_gpus=2, gpus=("4", "5", "7"))
    with (
        lease_devices(1, devices=build.gpus, lock_dir=tmp_path / "devices" / "gpu"),
        pytest.raises(StageError, match="sees 5,7"),
    ):
        run_stage(EchoSpec(text="hello", device="cuda"), build)
    with pytest.raises(StageError, match=r"status 1: sees \(whole log"):
        run_stage(EchoSpec(text="hello", device="cpu"), build)


def test_an_interrupted_build_ends_its_stage_and_the_one_that_waits(build: EntryBuild) -> None:
    errors: list[BaseException] = []

    def build_it(text: str) -> None:
        try:
            run_stage(EchoSpec(text=text, behaviour="hang"), build)
        except (StageError, InterruptedError) as error:
            errors.append(error)

    threads = [threading.Thread(target=build_it, args=(text,)) for text in ("one", "two")]

    def run_flow() -> None:
        with children_end_on_error():
            for thread in threads:
                thread.start()
            while not any("hearing" in log.read_text() for log in build.store.glob(f"echo/.building-*/{LOG_NAME}")):
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_flow()
    for thread in threads:
        thread.join(20)
    assert sorted(type(error).__name__ for error in errors) == ["InterruptedError", "StageError"]
    assert not [child for child in psutil.Process().children(recursive=True) if "echo" in " ".join(child.cmdline())]


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the mirror of every build of this test."""
    monkeypatch.setenv(MIRROR_VARIABLE, f"file://{tmp_path}/mirror")
    return tmp_path / "mirror"


@pytest.mark.usefixtures("mirror")
def test_what_one_host_has_built_another_takes_from_the_mirror(tmp_path: Path) -> None:
    here, elsewhere = entry_build(tmp_path / "here"), entry_build(tmp_path / "elsewhere")
    built = run_stage(EchoSpec(text="hello"), here)
    # Of a build that was interrupted there.
    leftover = elsewhere.store / "echo" / f".building-{built.artifact.key}" / "progress"
    leftover.mkdir(parents=True)
    taken = run_stage(EchoSpec(text="hello"), elsewhere)
    assert (built.is_reused, taken.is_reused) == (False, True)
    assert taken.artifact.path == elsewhere.store / "echo" / built.artifact.key
    assert taken.artifact.model_dump() == built.artifact.model_dump()
    assert (taken.artifact.path / "echo.txt").read_text() == "hello"
    # It ran once, on the other host; and what it wrote there is all that is here.
    assert (taken.artifact.path / LOG_NAME).read_text().count("hearing hello") == 1
    assert [path.name for path in (elsewhere.store / "echo").iterdir()] == [built.artifact.key]
    assert load_entry_record(elsewhere.store, "demo").keys == {"echo": built.artifact.key}


def test_a_damaged_copy_in_the_mirror_is_reported_built_again_and_replaced(
    tmp_path: Path, mirror: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_stage(EchoSpec(text="hello"), entry_build(tmp_path / "here"))
    (copy,) = mirror.rglob("echo.txt")
    copy.write_text("jello")
    again = run_stage(EchoSpec(text="hello"), entry_build(tmp_path / "elsewhere"))
    assert not again.is_reused
    assert "is refused and built again" in caplog.text
    assert copy.read_text() == "hello"
    assert run_stage(EchoSpec(text="hello"), entry_build(tmp_path / "third")).is_reused


def test_what_was_built_before_there_was_a_mirror_goes_there_with_the_next_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = entry_build(tmp_path / "store")
    run_stage(EchoSpec(text="hello"), build)
    monkeypatch.setenv(MIRROR_VARIABLE, f"file://{tmp_path}/mirror")
    assert run_stage(EchoSpec(text="hello"), build).is_reused
    assert run_stage(EchoSpec(text="hello"), entry_build(tmp_path / "elsewhere")).is_reused


class WideSpec(EchoSpec):
    num_processes: int = 2


def test_several_processes_run_under_torchrun(tmp_path: Path) -> None:
    command = stage_command(WideSpec(text="hello"), tmp_path / "spec.json", tmp_path / "out")
    assert command[1:] == [
        *("-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file"),
        *("--rdzv-endpoint=", "--local-addr=127.0.0.1", "--nproc-per-node=2"),
        *("-m", "specforge_core", "echo", "--spec", str(tmp_path / "spec.json"), "--out", str(tmp_path / "out")),
    ]
    for alone in (WideSpec(text="hello", num_processes=1), EchoSpec(text="hello")):
        assert "torch.distributed.run" not in stage_command(alone, tmp_path / "spec.json", tmp_path)


def test_several_nodes_meet_under_the_key_of_what_they_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NNODES", "2")
    spec = WideSpec(text="hello", num_processes=1)
    command = stage_command(spec, tmp_path / "spec.json", tmp_path / "out")
    assert command[1:6] == [
        *("-m", "torch.distributed.run", "--rdzv-backend=c10d", f"--rdzv-id={spec.key()}", "--nproc-per-node=1"),
    ]
    assert "torch.distributed.run" not in stage_command(EchoSpec(text="hello"), tmp_path / "spec.json", tmp_path)


def test_the_processes_of_a_stage_have_half_of_the_cores_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(num_processes: int) -> str:
        return stage_environment(WideSpec(text="hello", num_processes=num_processes), ())["OMP_NUM_THREADS"]

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert stage_environment(EchoSpec(text="hello"), ())["OMP_NUM_THREADS"] == "32"
    assert [threads(1), threads(4), threads(48)] == ["32", "8", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(4) == "3"


def test_an_error_names_the_exception_that_torchrun_found_first() -> None:
    # Its report, without what the processes themselves printed before.
    report = [
        "Root Cause (first observed failure):",
        "  rank      : 1 (local_rank: 1)",
        "  traceback : Traceback (most recent call last):",
        "  ValueError: lower it",
        "",
        "=" * 60,
    ]
    error = StageError("train", ProcessError("stage train", 1, report), Path("log"))
    assert str(error) == "stage train ended with status 1: ValueError: lower it (whole log: log)"


def said(status: int, *lines: str) -> str:
    """What a build says of a stage that ended so."""
    return str(StageError("train", ProcessError("stage train", status, lines), Path("log")))


def test_an_error_names_the_exception_and_not_what_is_printed_behind_it() -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "main.py", line 1, in main',
        "    raise final_result",
        "OSError: [Errno 28] No space left on device",
        "resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked semaphore objects",
        "  warnings.warn('resource_tracker: There appear to be %d '",
        "[rank0]:[W1122 process_group.cpp:1] Warning: WARNING: destroy_process_group() was not called",
        "",
    ]
    assert said(1, *lines) == (
        "stage train ended with status 1: OSError: [Errno 28] No space left on device (whole log: log)"
    )
    assert said(1, *(f"[rank1]: {line}" for line in lines)) == (
        "stage train ended with status 1: [rank1]: OSError: [Errno 28] No space left on device (whole log: log)"
    )
    # A process that was killed while it told its error.
    assert said(1, *lines[:3]) == "stage train ended with status 1: raise final_result (whole log: log)"
    assert said(1) == "stage train ended with status 1: it printed nothing (whole log: log)"


def test_a_killed_stage_is_told_from_one_that_failed() -> None:
    # -9: its supervisor was; 137: it was itself, as its supervisor says.
    for status in (-9, 137):
        assert said(status, "train:  87%") == (
            "stage train was killed (SIGKILL; out of memory?): train:  87% (whole log: log)"
        )
    assert said(128 + 15, "hi") == "stage train was killed (SIGTERM): hi (whole log: log)"
    assert said(1, "  traceback : Signal 9 (SIGKILL) received by PID 7", "=" * 60) == (
        "stage train ended with status 1: Signal 9 (SIGKILL; out of memory?) received by PID 7 (whole log: log)"
    )
    # No signal has that number.
    assert said(255, "hi") == "stage train ended with status 255: hi (whole log: log)"
