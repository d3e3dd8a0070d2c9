"""How a stage is started: as one process, or as several under torchrun. Torch-free."""

import os
import sys
from pathlib import Path

from specforge_core.stages import StageSpec

NODES_VARIABLE = "PET_NNODES"
"""torchrun's own name, as is PET_RDZV_ENDPOINT (host:port on one of the nodes), which it wants beside. With both set a
training spans so many nodes: it waits until the command that it logs runs on the others, over the same store."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
"""For processes that train together on one host; gloo would listen at the host's own address."""


def stage_command(spec: StageSpec, spec_path: Path, out: Path) -> list[str]:
    """The command line of a stage; a spec that asks for several processes, or a training on several nodes, runs under
    torchrun.
    """
    stage = ["-m", "specforge_core", spec.stage, "--spec", str(spec_path), "--out", str(out)]
    num_processes = getattr(spec, "num_processes", None)
    if num_processes is None:
        return [sys.executable, *stage]
    # Processes of one host meet in a file: torchrun's own way is a port on every interface, and what it reads there is
    # a pickle. The key tells a job of several nodes from others at the same endpoint.
    in_a_file = ["--rdzv-conf=store_type=file", "--rdzv-endpoint=", "--local-addr=127.0.0.1"]
    meeting = [f"--rdzv-id={spec.key()}"] if spans_nodes() else in_a_file
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", *meeting, f"--nproc-per-node={num_processes}"]
    return [sys.executable, *(launcher if spans_nodes() or num_processes > 1 else []), *stage]


def spans_nodes() -> bool:
    """Whether a training here is one of several nodes."""
    return os.environ.get(NODES_VARIABLE, "1") != "1"
