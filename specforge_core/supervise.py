"""`python -m specforge_core.supervise GRACE_S COMMAND...`: run COMMAND, and end it when standard input closes.

The starter holds the other end of that pipe. However the starter dies (SIGKILL and a closed laptop included), the
kernel closes it, and everything that COMMAND started is ended: SIGTERM, GRACE_S seconds, SIGKILL. Exit status:
COMMAND's, or 128 + the signal that ended it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import psutil

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
POLL_S = 0.05


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent dies (Linux; elsewhere nothing happens).

    torchrun puts each rank into a session of its own, so a killed torchrun leaves ranks that no process group names.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """End every descendant of this process; `child` is the one whose exit status is still wanted."""
    deadline = time.monotonic() + grace_s
    asked: set[psutil.Process] = set()
    while True:
        # Reaps the child through Popen: os.waitpid(-1) could steal its exit status.
        child.poll()
        living = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
        if not living:
            return
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                if time.monotonic() > deadline:
                    process.kill()
                elif process not in asked:
                    asked.add(process)
                    process.terminate()
        time.sleep(POLL_S)


def main() -> int:
    """The exit status of the command."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    end_asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: end_asked.set())
    adopt_orphans()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def wait_for_end_of_input() -> None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 4096):
                pass
        end_asked.set()

    threading.Thread(target=wait_for_end_of_input, daemon=True).start()
    while child.poll() is None and not end_asked.wait(POLL_S):
        pass
    # Also after a command that ended by itself: its children may not have.
    end_descendants(child, grace_s)
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
