"""The producer of live features as it is, but for the server that it starts, and a note of each item that it makes."""

import os
import sys
import time
from pathlib import Path

from specforge_core.benchmark import server
from specforge_core.data import spool
from specforge_core.targets import handover, live
from tests.sglang_like import MODULE

JOURNAL_VARIABLE, MEMORY_VARIABLE, PAUSE_VARIABLE = "LIVE_JOURNAL", "LIVE_MEMORY", "LIVE_PAUSE_S"


class NotingWriter(spool.SpoolWriter):
    def add(self, number: int, whole: Path, *, num_tokens: int) -> None:
        time.sleep(float(os.environ.get(PAUSE_VARIABLE, "0")))
        super().add(number, whole, num_tokens=num_tokens)
        with Path(os.environ[JOURNAL_VARIABLE]).open("a") as journal:
            journal.write(f"{os.getpid()} {number}\n")


if __name__ == "__main__":
    server.SGLANG_MODULE = MODULE
    handover.MEMORY = Path(os.environ[MEMORY_VARIABLE])
    live.SpoolWriter = NotingWriter  # type: ignore[misc]
    sys.exit(live.main())
