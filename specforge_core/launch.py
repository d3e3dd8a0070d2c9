"""How a stage is started: as one process, or as several under torchrun. Torch-free."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from specforge_core.stages import StageSpec

NODES_VARIABLE = "PET_NNODES"
"""torchrun's own name, as is PET_RDZV_ENDPOINT (host:port on one of the nodes), which it wants beside. With both set a
training spans so many nodes: it waits until the command that it logs runs on the others, over the same store."""
THREADS_VARIABLE = "OMP_NUM_THREADS"
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
"""For processes that train together on one host; gloo would listen at the host's own address."""


def stage_command(spec: StageSpec, spec_path: Path, out: Path) -> list[str]:
    """The command line of a stage; a spec that asks for several processes, or a training on several nodes, runs under
    torchrun.
    """
    stage = ["-m", "specforge_core", spec.stage, "--spec", str(spec_path), "--out", str(out)]
    num_processes = _num_processes(spec)
    if num_processes is None:
        return [sys.executable, *stage]
    # Processes of one host meet in a file: torchrun's own way is a port on every interface, and what it reads there is
    # a pickle. The key tells a job of several nodes from others at the same endpoint.
    in_a_file = ["--rdzv-conf=store_type=file", "--rdzv-endpoint=", "--local-addr=127.0.0.1"]
    meeting = [f"--rdzv-id={spec.key()}"] if spans_nodes() else in_a_file
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", *meeting, f"--nproc-per-node={num_processes}"]
    return [sys.executable, *(launcher if spans_nodes() or num_processes > 1 else []), *stage]


def stage_environment(spec: StageSpec, devices: Sequence[str]) -> dict[str, str]:
    """The variables of a stage's processes: this one's, but for the GPUs. Args: devices: their ids."""
    return {
        # torchrun would give each process one thread, and with it all that the process starts.
        THREADS_VARIABLE: str(num_threads(_num_processes(spec) or 1)),
        **({} if spans_nodes() else LOOPBACK),
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(devices),
    }


def num_threads(num_processes: int = 1) -> int:
    """Of each of so many processes, unless its user says another number: together half as many as there are cores.

    OpenMP's threads wait for each other by spinning. With one on every core, a single core that something else uses
    holds all of them up: on a shared 4-core machine decoding ran at 498 tokens/s with two threads and at 73 with four.
    """
    return max(1, (os.cpu_count() or 1) // (2 * num_processes))


def _num_processes(spec: StageSpec) -> int | None:
    """On this host; None of a stage that is always one."""
    return getattr(spec, "num_processes", None)


def spans_nodes() -> bool:
    """Whether a training here is one of several nodes."""
    return os.environ.get(NODES_VARIABLE, "1") != "1"
