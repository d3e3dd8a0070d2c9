"""A connection to the Hub, and the one place where a call is tried again and its error put into words. Torch-free.

The token stays in here. An error of the client carries its request, Authorization included; what leaves this module is
a message without it, and no error that led to it.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from huggingface_hub import HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils._http import default_client_factory

from specforge_core.process import ending

logger = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT_S = 120.0
"""Without a byte in either direction. The client's own is none at all."""
DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Before each further try."""
MAX_DELAY_S = 300.0
"""Where the Hub itself says how long to wait."""
MAX_MESSAGE_CHARACTERS = 300
# 412 is a commit whose parent is no longer the head: read again, it may have become unnecessary.
TRANSIENT = frozenset({408, 412, 425, 429})
WAYS_OUT = {
    401: "the token is not accepted: renew HF_TOKEN, or log in with `hf auth login`",
    403: "the token may not do this: use one with the right to write there, or change `publish` of the entry",
}


class Hub:
    """The Hub at one address, as the owner of one token."""

    def __init__(self, endpoint: str, token: str, *, delays_s: tuple[float, ...] = DELAYS_S) -> None:
        """Args: endpoint: `https://huggingface.co`, or what speaks like it; delays_s: how often a call is tried again,
        and after how long.
        """
        _limit_silence()
        self.endpoint = endpoint.rstrip("/")
        self.api = HfApi(endpoint=self.endpoint, token=token, library_name="specbundle")
        self._token = token
        self._delays_s = delays_s

    def __repr__(self) -> str:
        return f"Hub({self.endpoint!r})"

    def call(self, what: str, function: Callable[[], T]) -> T:
        """What `function` returns. After a transient failure it is called again, so it has to be safe to repeat.

        Args: what: says in a message what was tried.
        Raises: ValueError if the Hub refuses, ConnectionError if it stays out of reach, InterruptedError if this
        process is asked to end meanwhile.
        """
        for delay_s in (*self._delays_s, None):
            try:
                return function()
            except (HTTPError, RuntimeError) as error:
                failure = self._failure(error)
                if failure is None:
                    raise
            # Out here, so that no error holds the one of the client.
            message = f"{what}: the Hub at {self.endpoint} {failure.text}"
            if not failure.is_transient:
                raise ValueError(message)
            if delay_s is None:
                raise ConnectionError(f"{message}; gave up after {len(self._delays_s) + 1} tries; try again later")
            delay_s = min(max(delay_s, failure.retry_after_s), MAX_DELAY_S)
            logger.warning("%s; again in %.0f s", message, delay_s)
            if ending.wait(delay_s):
                raise InterruptedError(f"stopped while {what}")
        raise AssertionError("the last try returns or raises")

    def _failure(self, error: Exception) -> "_Failure | None":
        """What an error of the client means; None if it is not the Hub's."""
        # An upload's error is wrapped once more.
        cause = error if isinstance(error, HTTPError) else error.__cause__
        if not isinstance(cause, HTTPError):
            return None
        if not isinstance(cause, HfHubHTTPError):
            text = self._clean(f"{type(cause).__name__} {cause}".strip())
            return _Failure(f"did not answer ({text})", is_transient=True)
        response = cause.response
        status = response.status_code
        is_transient = status in TRANSIENT or status >= 500
        text = self._clean(cause.server_message or str(cause))
        way_out = f"; {WAYS_OUT[status]}" if status in WAYS_OUT else ""
        retry_after = response.headers.get("Retry-After", "")
        return _Failure(
            f"answered {status} ({text}){way_out}",
            is_transient=is_transient,
            retry_after_s=float(retry_after) if retry_after.isdecimal() else 0.0,
        )

    def _clean(self, text: str) -> str:
        """One line without the token, which a server or a proxy may have put into its answer."""
        return " ".join(text.replace(self._token, "***").split())[:MAX_MESSAGE_CHARACTERS]


class _Failure(NamedTuple):
    text: str
    is_transient: bool
    retry_after_s: float = 0.0


@functools.cache
def _limit_silence() -> None:
    """Make every connection of this process to the Hub give up after TIMEOUT_S; the client offers no other place."""

    def factory():  # type: ignore[no-untyped-def]
        # httpx before huggingface_hub 2, httpx2 since.
        client = default_client_factory()
        client.timeout = TIMEOUT_S
        return client

    set_client_factory(factory)
