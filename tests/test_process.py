"""Children end with their starter, however it ends, and say why when they fail. Real processes throughout."""

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from specforge_core.process import ProcessError, SupervisedProcess, children_end_on_error, ending

# A child with a grandchild in a session of its own, as torchrun starts its ranks.
FAMILY = textwrap.dedent("""
    import subprocess, sys, time
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    print("grandchild", grandchild.pid, flush=True)
    time.sleep(60)
""")
STUBBORN = textwrap.dedent("""
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
    time.sleep(60)
""")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_until(is_so: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(0.05)
    return False


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_lines_reach_the_log_and_the_listener(tmp_path: Path) -> None:
    lines: list[str] = []
    command = python("import sys; print('to stdout'); print('to stderr', file=sys.stderr)")
    with SupervisedProcess("child", command, log=tmp_path / "log", on_line=lines.append) as process:
        process.wait()
    assert sorted(lines) == ["to stderr", "to stdout"]
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["to stderr", "to stdout"]


def test_a_failure_carries_the_status_and_the_last_forty_lines(tmp_path: Path) -> None:
    command = python("print(*range(100), sep='\\n'); raise SystemExit(7)")
    with SupervisedProcess("child", command, log=tmp_path / "log") as process, pytest.raises(ProcessError) as caught:
        process.wait()
    assert caught.value.status == 7
    assert caught.value.last_lines == tuple(str(number) for number in range(60, 100))


def test_a_signal_that_ends_a_child_is_told_as_shells_do_and_in_words(tmp_path: Path) -> None:
    command = python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    killed = r"child was killed \(SIGKILL; out of memory\?\)"
    with (
        SupervisedProcess("child", command, log=tmp_path / "log") as process,
        pytest.raises(ProcessError, match=killed) as caught,
    ):
        process.wait()
    assert caught.value.status == 128 + signal.SIGKILL


def test_leaving_the_block_ends_child_and_grandchild(tmp_path: Path) -> None:
    lines: list[str] = []
    with SupervisedProcess("child", python(FAMILY), log=tmp_path / "log", on_line=lines.append) as process:
        process.wait_ready(lambda: bool(lines), timeout_s=20)
        grandchild = int(lines[0].split()[1])
        assert is_alive(grandchild)
    assert not is_alive(grandchild)


def test_grandchildren_of_a_child_that_ended_by_itself_end_too(tmp_path: Path) -> None:
    lines: list[str] = []
    command = python(FAMILY.removesuffix("time.sleep(60)\n"))
    with SupervisedProcess("child", command, log=tmp_path / "log", on_line=lines.append) as process:
        process.wait()
    assert not is_alive(int(lines[0].split()[1]))


def test_a_child_deaf_to_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    lines: list[str] = []
    started_at = time.monotonic()
    with SupervisedProcess(
        "child", python(STUBBORN), log=tmp_path / "log", on_line=lines.append, grace_s=0.5
    ) as process:
        process.wait_ready(lambda: bool(lines), timeout_s=20)
        process.stop()
        with pytest.raises(ProcessError, match="child was stopped; its last lines:\ndeaf") as caught:
            process.wait()
    assert caught.value.status == 128 + signal.SIGKILL
    assert time.monotonic() - started_at < 20


def test_a_child_that_heeds_sigterm_has_time_to_finish(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import signal, sys, time
        def finish(*_):
            time.sleep(0.5)
            print("saved", flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, finish)
        print("ready", flush=True)
        time.sleep(60)
    """)
    lines: list[str] = []
    with SupervisedProcess("child", python(code), log=tmp_path / "log", on_line=lines.append) as process:
        process.wait_ready(lambda: "ready" in lines, timeout_s=20)
    assert lines == ["ready", "saved"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_child_outlives_its_starter(tmp_path: Path, number: signal.Signals) -> None:
    code = textwrap.dedent(f"""
        import pathlib, sys
        from specforge_core.process import SupervisedProcess
        command = [sys.executable, "-c", {FAMILY!r}]
        with SupervisedProcess("child", command, log=pathlib.Path({str(tmp_path / "log")!r}), grace_s=1) as process:
            process.wait()
    """)
    starter = subprocess.Popen(python(code), stderr=subprocess.DEVNULL)
    log = tmp_path / "log"
    assert wait_until(lambda: log.exists() and "\n" in log.read_text())
    family = psutil.Process(starter.pid).children(recursive=True)
    # The supervisor, the child and the grandchild.
    assert len(family) == 3
    starter.send_signal(number)
    starter.wait()
    # Some hosts are slow to reap what lost its parent.
    assert wait_until(lambda: not any(is_alive(process.pid) for process in family), timeout_s=10)


def test_a_held_lock_is_free_only_when_the_last_descendant_is_gone(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import fcntl, os, pathlib, sys
        from specforge_core.process import SupervisedProcess
        lock = open({str(tmp_path / "lock")!r}, "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-c", {STUBBORN!r}]
        log = pathlib.Path({str(tmp_path / "log")!r})
        with SupervisedProcess("child", command, log=log, grace_s=1, hold_fds=[lock.fileno()]) as process:
            process.wait()
    """)
    starter = subprocess.Popen(python(code))
    log = tmp_path / "log"
    assert wait_until(lambda: log.exists() and "deaf" in log.read_text())
    supervisor = psutil.Process(starter.pid).children()[0]
    (child,) = supervisor.children()
    starter.kill()
    starter.wait()
    with (tmp_path / "lock").open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not is_alive(child.pid)


def test_a_child_that_dies_before_it_is_ready_is_told_with_its_lines(tmp_path: Path) -> None:
    command = python("print('no port left'); raise SystemExit(3)")
    with (
        SupervisedProcess("server", command, log=tmp_path / "log") as process,
        pytest.raises(ProcessError, match="no port left"),
    ):
        process.wait_ready(lambda: False, timeout_s=20)


def test_waiting_for_readiness_ends_at_its_limit(tmp_path: Path) -> None:
    command = python("import time; print('still loading', flush=True); time.sleep(60)")
    lines: list[str] = []
    with SupervisedProcess("server", command, log=tmp_path / "log", on_line=lines.append) as process:
        process.wait_ready(lambda: bool(lines), timeout_s=20)
        with pytest.raises(TimeoutError, match=r"not ready after 0\.3 s.*\n.*still loading"):
            process.wait_ready(lambda: False, timeout_s=0.3)


def test_a_listener_that_fails_does_not_block_the_child(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(line: str) -> None:
        raise OSError("disk full")

    # More than a pipe holds: a reader that stopped would leave the child hanging.
    command = python("print('x' * 1000 * 1000); print('y')")
    with SupervisedProcess("child", command, log=tmp_path / "log", on_line=fail) as process:
        process.wait(timeout_s=20)
    assert (tmp_path / "log").read_text().endswith("y\n")
    assert "disk full" in caplog.text


def test_an_error_in_a_flow_ends_children_that_other_threads_wait_for(tmp_path: Path) -> None:
    outcome: list[BaseException] = []
    ready = threading.Event()

    def stage() -> None:
        command = python("import time; print('up', flush=True); time.sleep(60)")
        try:
            with SupervisedProcess("child", command, log=tmp_path / "log", on_line=lambda _: ready.set()) as process:
                process.wait()
        except ProcessError as error:
            outcome.append(error)

    thread = threading.Thread(target=stage)

    def run_flow() -> None:
        with children_end_on_error():
            thread.start()
            assert ready.wait(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_flow()
    thread.join(20)
    assert not thread.is_alive()
    assert len(outcome) == 1
    # And none is started after that, until the next flow begins.
    with (
        SupervisedProcess("late", python("import time; time.sleep(60)"), log=tmp_path / "late") as process,
        pytest.raises(ProcessError),
    ):
        process.wait(timeout_s=20)
    with children_end_on_error():
        assert not ending.is_set()


def test_a_supervisor_needs_no_environment_of_its_starter(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "GREETING": "hello"}
    lines: list[str] = []
    command = python("import os; print(os.environ['GREETING'], 'HOME' in os.environ)")
    with SupervisedProcess("child", command, log=tmp_path / "log", env=env, on_line=lines.append) as process:
        process.wait()
    assert lines == ["hello False"]


def test_a_full_disk_costs_lines_of_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    # More than a pipe holds: of a reader that ended, the child would die.
    command = python("for i in range(20_000): print('line', i)")
    with SupervisedProcess("child", command, log=Path("/dev/full"), on_line=lines.append) as process:
        process.wait(timeout_s=20)
    assert len(lines) == 20_000
    assert process.last_lines[-1] == "line 19999"
    assert [record.getMessage() for record in caplog.records] == [
        "/dev/full misses lines of child: [Errno 28] No space left on device"
    ]
