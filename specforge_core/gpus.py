"""What this host computes on, and leases of its devices: one lock file each, let go by the kernel when its holder dies.

Torch-free: a CUDA context in the process that only hands out GPUs would take memory from the stages.
"""

import contextlib
import fcntl
import logging
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

logger = logging.getLogger(__name__)

POLL_S = 0.2
NVIDIA_SMI_TIMEOUT_S = 60.0


class Gpu(NamedTuple):
    """One GPU of this host."""

    id: str
    """As CUDA_VISIBLE_DEVICES takes it."""
    name: str


class Lease(NamedTuple):
    """Devices that nobody else gets meanwhile."""

    devices: tuple[str, ...]
    fds: tuple[int, ...]
    """Their locked files: a child that holds one keeps the device leased until it is gone too."""


NO_DEVICES = Lease((), ())


def list_gpus(visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs of this host; none where there is no `nvidia-smi`.

    Args: visible: value of CUDA_VISIBLE_DEVICES, which restricts them (indices or UUIDs).
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=NVIDIA_SMI_TIMEOUT_S,
    )
    if listed.returncode != 0:
        logger.warning("nvidia-smi fails, so this host counts as one without a GPU: %s", listed.stdout.strip())
        return ()
    rows = [[cell.strip() for cell in line.split(",", maxsplit=2)] for line in listed.stdout.splitlines()]
    if visible is None:
        return tuple(Gpu(index, name) for index, _, name in rows)
    names = {id: name for index, uuid, name in rows for id in (index, uuid)}
    # CUDA too stops at the first id that it does not know.
    gpus = []
    for id in visible.split(","):
        if id.strip() not in names:
            break
        gpus.append(Gpu(id.strip(), names[id.strip()]))
    return tuple(gpus)


def visible_devices() -> tuple[str, ...]:
    """Ids of the GPUs that this process may use: those of its lease, or all where nobody leased any."""
    # The environment is read here because that is where a lease is written, for every library below as well.
    return tuple(gpu.id for gpu in list_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")))


def cpu_name() -> str:
    """The model name of the processor, as Linux reports it; elsewhere the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _try_lock(path: Path) -> IO[str] | None:
    """The locked file, or None if someone else holds it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def lease_devices(
    num_devices: int,
    *,
    devices: Sequence[str],
    lock_dir: Path,
    cancelled: threading.Event | None = None,
    timeout_s: float = float("inf"),
) -> Iterator[Lease]:
    """A lease on `num_devices` of `devices`, waited for in turn with every other asker on this host.

    Raises: ValueError if there are not that many, TimeoutError, InterruptedError once `cancelled` is set.
    """
    if num_devices > len(devices):
        raise ValueError(f"{num_devices} devices wanted, but this host has {len(devices)}: {', '.join(devices)}")
    lock_dir.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    held: dict[str, IO[str]] = {}
    with contextlib.ExitStack() as locks:

        def take(name: str) -> IO[str] | None:
            file = _try_lock(lock_dir / name)
            return None if file is None else locks.enter_context(file)

        # One asker at a time collects devices, so that no two hold half of what both need.
        turn: IO[str] | None = None
        has_said_so = False
        while len(held) < num_devices:
            if cancelled and cancelled.is_set():
                raise InterruptedError(f"stopped while waiting for {num_devices} of {len(devices)} devices")
            turn = turn or take("turn")
            for device in devices if turn else ():
                if device not in held and len(held) < num_devices and (file := take(device)):
                    held[device] = file
            if len(held) == num_devices:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {num_devices} of {len(devices)} devices became free in {timeout_s:g} s")
            if not has_said_so:
                names = ", ".join(devices)
                logger.info("waiting for %d of %s: another build on this host computes there", num_devices, names)
                has_said_so = True
            time.sleep(POLL_S)
        if turn:
            turn.close()
        ids = tuple(device for device in devices if device in held)
        yield Lease(ids, tuple(held[id].fileno() for id in ids))
