"""A small server that speaks the part of SGLang's HTTP API that the factory uses, and takes its flags.

`python -m tests.sglang_like.launch_server --model-path DIR --port PORT ...`. How it answers and fails is set by one
environment variable, so that a stage's own process can start it as it would start SGLang:

    monkeypatch.setenv(*Behaviour(die_after=5, num_faulty_starts=1, journal=str(tmp_path / "journal")).variable())
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULE = "tests.sglang_like.launch_server"
VARIABLE = "SGLANG_LIKE"


@dataclass(frozen=True)
class Behaviour:
    """What a server of this package does besides answering. Counts are of `/generate` requests since its start."""

    answers: str = "scripted"
    """`scripted`: made up at once; `model`: decoded by the target (and draft) of the flags, in process."""
    step_delay_s: float = 0.0
    """Pause per pass of the target, so that a draft saves time."""
    journal: str | None = None
    """File that gets a JSON line for each start (`argv`, `pid`), each `/generate` answered (`rid`, `pid`) and each
    flush of the cache (`pid`)."""
    num_good_starts: int = 0
    num_faulty_starts: int | None = None
    """So many starts, counted in the journal, have none of the faults below; then so many have them (None: all)."""
    exit_at_start: str | None = None
    """Print this and exit with status 1."""
    hang_at_start: bool = False
    start_delay_s: float = 0.0
    die_after: int | None = None
    """Die of SIGKILL when one more request comes in."""
    deaf_after: int | None = None
    """Accept connections and answer nothing, `/health` included, from one more request on."""
    fail_every: int | None = None
    """Answer every so many-th request with status 500."""
    abort_every: int | None = None
    """Give up every so many-th request halfway, with status 200 and the finish reason `abort`."""
    drop_every: int | None = None
    """Close the connection of every so many-th request without an answer."""
    hides_draft_figures: bool = False
    """Say nothing about the draft in `meta_info`, as a server that was started without one."""
    max_capacity: int | None = None
    """Tokens that the KV cache holds at most, whatever was asked for."""
    lacks: tuple[str, ...] = ()
    """Flags that this server does not know."""

    def variable(self) -> tuple[str, str]:
        """Name and value of the environment variable."""
        return VARIABLE, json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "Behaviour":
        """The behaviour that the environment asks for, at this start."""
        fields = json.loads(environ.get(VARIABLE, "{}"))
        asked = cls(**fields | {"lacks": tuple(fields.get("lacks", ()))})
        if asked.num_good_starts == 0 and asked.num_faulty_starts is None:
            return asked
        assert asked.journal is not None, "starts are counted in the journal"
        num_starts = sum(line["event"] == "start" for line in read_journal(asked.journal))
        first_cured = (
            float("inf") if asked.num_faulty_starts is None else asked.num_good_starts + asked.num_faulty_starts
        )
        if asked.num_good_starts <= num_starts < first_cured:
            return asked
        return cls(answers=asked.answers, step_delay_s=asked.step_delay_s, journal=asked.journal, lacks=asked.lacks)


def read_journal(path: Path | str) -> list[dict[str, Any]]:
    """What the servers with this journal noted so far; nothing before the first start."""
    file = Path(path)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
