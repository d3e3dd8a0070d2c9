"""`python -m tests.training.hanging_save STEP RANK ARGUMENTS...`: the stage of these arguments, on a disk from which
process RANK never comes back when it has written its part of the checkpoint of STEP.
"""

import os
import sys
import threading
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter

from specforge_core.__main__ import main
from specforge_core.training import checkpoint


def hang_at(step: int) -> None:
    """Let no checkpoint of that step become whole."""

    def write_data(self: checkpoint._Writer, *args: Any) -> Any:
        written = FileSystemWriter.write_data(self, *args)
        if self._state.step == step:
            threading.Event().wait()
        return written

    checkpoint._Writer.write_data = write_data  # type: ignore[method-assign]


def hanging_main(step: int, arguments: list[str]) -> int:
    """The stage of these arguments, in this process alone."""
    hang_at(step)
    return main(arguments)


if __name__ == "__main__":
    step, rank, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        hang_at(int(step))
    sys.exit(main(arguments))
