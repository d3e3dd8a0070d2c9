"""Child processes that never outlive this one: stages, servers. Torch-free.

Each child runs under `specforge_core.supervise`, which ends it with all its descendants when this process stops it or
is itself gone, in whatever way.
"""

import contextlib
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

NUM_LAST_LINES = 40
GRACE_S = 10.0
POLL_S = 0.2
SHELL_SIGNAL_BASE = 128
SIGKILL_IN_WORDS = "SIGKILL; out of memory?"
"""Nobody else kills so, but a person who knows it."""

ending = threading.Event()
"""Set while this process ends all its children: nothing new may be started or waited for."""

_children: set["SupervisedProcess"] = set()


class ProcessError(RuntimeError):
    """A child that failed, or was stopped, with the last lines that it printed."""

    def __init__(self, name: str, status: int, last_lines: Sequence[str], *, was_stopped: bool = False) -> None:
        self.name, self.status, self.last_lines = name, status, tuple(last_lines)
        self.outcome = "was stopped" if was_stopped else _outcome(status)
        """In words, to be put behind the name."""
        super().__init__(f"{name} {self.outcome}; its last lines:\n" + "\n".join(last_lines))


def _outcome(status: int) -> str:
    # The supervisor tells a signal as shells do; subprocess tells the supervisor's own as a negative number.
    number = -status if status < 0 else status - SHELL_SIGNAL_BASE
    if number not in set(signal.Signals):
        return f"ended with status {status}"
    return f"was killed ({SIGKILL_IN_WORDS if number == signal.SIGKILL else signal.Signals(number).name})"


@contextlib.contextmanager
def children_end_on_error() -> Iterator[None]:
    """Around the body of a flow: on any way out but success, stop every child started meanwhile, and start no other.

    A signal raises in the main thread alone. Threads that wait for a child would keep the process open; ending their
    children frees them.
    """
    ending.clear()
    older = set(_children)
    try:
        yield
    except BaseException:
        ending.set()
        for child in _children - older:
            child.stop()
        raise


class SupervisedProcess:
    """A running child, as a context manager: leaving the block ends it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
        grace_s: float = GRACE_S,
        hold_fds: Sequence[int] = (),
    ) -> None:
        """Args:
        name: for messages.
        log: file that its output (standard error included) is appended to.
        env: the whole environment; this process's own when absent.
        on_line: called with each line of output, in a thread of its own.
        grace_s: between asking the child to end and killing it.
        hold_fds: files with locks that stay locked until the last descendant is gone, even if this process dies first.
        """
        self.name, self.command, self.grace_s = name, list(command), grace_s
        self._log, self._env, self._on_line, self._hold_fds = log, env, on_line, tuple(hold_fds)
        self.last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._was_stopped = False
        self._log_is_whole = True

    def __enter__(self) -> "SupervisedProcess":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.touch()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "specforge_core.supervise", str(self.grace_s), *self.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
            env=None if self._env is None else {**self._env, "PYTHONUNBUFFERED": "1"},
            pass_fds=self._hold_fds,
            # Out of reach of Ctrl-C at the terminal: this process decides in which order its children end.
            start_new_session=True,
        )
        _children.add(self)
        if ending.is_set():
            self.stop()
        self._reader = threading.Thread(target=self._read_output, name=f"output of {self.name}", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._process.wait()
        self._reader.join()
        _children.discard(self)

    def _read_output(self) -> None:
        # An error in this thread would leave the child with a pipe that is full or closed.
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self.last_lines.append(line.rstrip("\n"))
                self._write_log(line)
                self._hand_on(line.rstrip("\n"))

    def _write_log(self, line: str) -> None:
        try:
            # Opened anew: what did not fit is not kept for the next line, which may be in time for room.
            with self._log.open("a", encoding="utf-8") as log:
                log.write(line)
        except OSError as error:
            if self._log_is_whole:
                logger.error("%s misses lines of %s: %s", self._log, self.name, error)
            self._log_is_whole = False

    def _hand_on(self, line: str) -> None:
        if self._on_line is None:
            return
        try:
            self._on_line(line)
        except Exception:
            logger.exception("lines of %s go to %s alone from here on", self.name, self._log)
            self._on_line = None

    def stop(self) -> None:
        """Ask the supervisor to end the child. Returns at once; leaving the block waits for the end."""
        self._was_stopped = self._was_stopped or self._process.poll() is None
        assert self._process.stdin is not None
        # ValueError: two threads may stop one child, and the second finds the pipe closed.
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()

    @property
    def is_running(self) -> bool:
        """Whether the child has not ended yet."""
        return self._process.poll() is None

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the child has ended well. Raises: ProcessError if it failed or was stopped, TimeoutError."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} still runs after {timeout_s:g} s") from None
        self._reader.join()
        if status != 0 or self._was_stopped:
            raise ProcessError(self.name, status, self.last_lines, was_stopped=self._was_stopped)

    def wait_ready(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Return when `is_ready` says so. Raises: ProcessError if the child ends before, TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if (status := self._process.poll()) is not None:
                self._reader.join()
                raise ProcessError(self.name, status, self.last_lines)
            if time.monotonic() > deadline:
                lines = "\n".join(self.last_lines)
                raise TimeoutError(f"{self.name} is not ready after {timeout_s:g} s; its last lines:\n{lines}")
            time.sleep(POLL_S)
