"""Faults of a Hub: which requests they hit, and what then happens instead of an answer."""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

FOREVER = 1_000_000


@dataclass
class Fault:
    """What happens to the requests whose `METHOD /path` matches. Without a status they get no answer at all."""

    request: str
    """Regular expression, such as `POST .*/commit/`."""
    when: Literal["before", "after"] = "before"
    """`after`: the request is carried out; only its answer is lost."""
    status: int | None = None
    """Of the answer."""
    message: Callable[[str], str] = lambda authorization: "made to fail"
    """What the answer says, given the request's own Authorization."""
    headers: Mapping[str, str] = field(default_factory=dict)
    silence_s: float = 0.0
    """The connection stays open for so long."""
    body_fraction: float = 1.0
    """Share of the request's body that is read before the connection breaks."""
    on_hit: Callable[[], None] = lambda: None
    """Called then, before the client sees anything: kills it, or lets another one publish in between."""
    change: Callable[[bytes], bytes] | None = None
    """Answers with other bytes than the file's."""
    passes: bool = False
    """The request is answered as if nothing were; only `on_hit` happens."""
    times: int = 1
    num_hits: int = 0


class Faults:
    """The faults of one server."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def hit(self, request: str) -> Fault | None:
        """The fault that this request meets now."""
        with self._lock:
            for fault in self._faults:
                if fault.num_hits < fault.times and re.match(fault.request, request):
                    fault.num_hits += 1
                    return fault
        return None
