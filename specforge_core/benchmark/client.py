"""An HTTP client of SGLang servers: token ids in, token ids out, many requests at once. Text is never read.

A request comes back answered, or refused, or the servers are lost. What breaks on the way (a server that dies, hangs or
answers with an error) is sent again once there is a server that answers. With one event loop there is `Client`; for
code that is not asynchronous, `completed`.

What SGLang 0.5.14 answers: `output_ids` are all new tokens, the one that ended the answer included; a prompt that
leaves no room for `max_new_tokens` in the context has status 400, and so has a `rid` that is still running.
"""

import asyncio
import contextlib
import json
import logging
import random
import threading
import time
import zlib
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from queue import SimpleQueue
from typing import Any, NamedTuple

import aiohttp

from specforge_core.benchmark.server import Server
from specforge_core.targets import FinishReason, GenerationRequest, Sampling

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 6
"""Of one request. More than a server has starts (`Launch.max_restarts`), so that one that dies each time ends the stage
and is not taken for so many bad requests."""
BACKOFF_S = 0.2
MAX_BACKOFF_S = 10.0
CONNECT_TIMEOUT_S = 10.0
SILENCE_S = 60.0
"""A server that has requests and answers none for so long is asked whether it is alive."""
TIMEOUT_S = 600.0
TIMEOUT_PER_TOKEN_S = 1.0
"""A request without an answer for so long is lost, though its server is alive; many times what the slowest takes."""
KEEPALIVE_S = 2.0
"""SGLang closes connections that are idle for 5 s: a request sent at that moment would break."""
MAX_SESSIONS = 2**16
"""Whose server is remembered."""
RETRIED_STATUS = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
DUPLICATE = "Duplicate request ID"
"""SGLang's words for a `rid` that it still works on, with status 400."""


class Reply(NamedTuple):
    """A server's answer to one request."""

    token_ids: tuple[int, ...]
    """New tokens, the end-of-turn token included. Of a server that drafts there may be some behind it: see `ended`."""
    finish_reason: FinishReason
    meta: dict[str, Any]
    """`meta_info`."""
    elapsed_s: float
    """From sending it (for the last time) to its answer."""
    num_attempts: int = 1
    """Times that it was sent."""

    def ended(self, eos_token_ids: frozenset[int]) -> "Reply":
        """The same, up to its first end-of-turn token.

        SGLang looks at the limit first: an answer whose last allowed token ends it counts as cut off, and one whose
        last verification step accepts tokens behind the end and reaches the limit keeps them.
        """
        ends = (i for i, token_id in enumerate(self.token_ids) if token_id in eos_token_ids)
        if (end := next(ends, None)) is None:
            return self
        return self._replace(token_ids=self.token_ids[: end + 1], finish_reason="stop")


class RequestRefused(ValueError):
    """The server does not take this request, and never will. Its own message."""


class RequestFailed(RuntimeError):
    """Every attempt at this request failed, though there are servers that answer."""


class _ServerFault(Exception):
    """The server took the request and broke down over it, or has no room."""


def sampling_params(sampling: Sampling, request_id: str) -> dict[str, Any]:
    """What `/generate` is to be told; an answer ends at the target's own end-of-turn tokens and nowhere else.

    A server takes notice of the seed only if it runs with `--enable-deterministic-inference`.
    """
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
    }
    if sampling.temperature > 0:
        params["sampling_seed"] = zlib.crc32(f"{sampling.seed}/{request_id}".encode())
    return params


def within_context(sampling: Sampling, request: GenerationRequest, context_length: int) -> Sampling:
    """The sampling, with no more new tokens than the context has room for: a server refuses a request for more."""
    room = context_length - len(request.input_ids)
    # At least one: of a prompt that leaves no room the server is to say so.
    return sampling._replace(max_new_tokens=max(1, min(sampling.max_new_tokens, room)))


class _Response(NamedTuple):
    status: int
    body: bytes


class _Replica:
    """One server, and how it is doing."""

    def __init__(self, server: Server, executor: ThreadPoolExecutor) -> None:
        self.server, self._executor = server, executor
        self.num_in_flight = 0
        self.heard_at = 0.0
        self.check: asyncio.Future[str] | None = None

    async def ensure_alive(self, url: str, reason: str) -> None:
        """Return when the server answers, or a successor of the one at `url`. One check serves all who wait.

        Raises: ServerLost.
        """
        if self.check is None or self.check.done():
            if self.server.url != url:
                return
            logger.warning("asking whether %s is alive: %s", url, reason)
            loop = asyncio.get_running_loop()
            self.check = loop.run_in_executor(self._executor, self.server.ensure_alive)
        await asyncio.shield(self.check)
        self.heard_at = time.monotonic()


class Client:
    """Sends requests to servers with the same options, as an asynchronous context manager."""

    def __init__(self, servers: Sequence[Server], *, max_in_flight: int) -> None:
        """Args: max_in_flight: requests at once, over all servers."""
        self._executor = ThreadPoolExecutor(len(servers), thread_name_prefix="server check")
        self._replicas = [_Replica(server, self._executor) for server in servers]
        self._room = asyncio.Semaphore(max_in_flight)
        self._share = -(-max_in_flight // len(servers))
        self._replica_of_session: dict[str, _Replica] = {}

    async def __aenter__(self) -> "Client":
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            headers={"Content-Type": "application/json"},
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        for replica in self._replicas:
            if replica.check is not None:
                replica.check.cancel()
        # A restart takes minutes; whoever owns the server cuts it short.
        self._executor.shutdown(wait=False, cancel_futures=True)
        await self._http.close()

    async def generate(
        self, rid: str, input_ids: Sequence[int], sampling_params: Mapping[str, Any], session: str | None = None
    ) -> Reply:
        """The answer. Waits while there are `max_in_flight` requests already.

        Args: rid: names the request on the server; later attempts add `#2`, `#3` .., because SGLang refuses a name that
        it still works on; session: requests with the same one go to the same server if it has room: it may still
        know the keys and values of what they have in common.
        Raises: RequestRefused, RequestFailed, ServerLost.
        """
        async with self._room:
            replica = self._choose(session)
            replica.num_in_flight += 1
            try:
                return await self._ask(replica, rid, {"input_ids": input_ids, "sampling_params": sampling_params})
            finally:
                replica.num_in_flight -= 1

    def _choose(self, session: str | None) -> _Replica:
        known = self._replica_of_session.pop(session, None) if session is not None else None
        if known is not None and known.num_in_flight < self._share:
            replica = known
        else:
            replica = min(self._replicas, key=lambda replica: replica.num_in_flight)
        if session is not None:
            self._replica_of_session[session] = replica
            if len(self._replica_of_session) > MAX_SESSIONS:
                del self._replica_of_session[next(iter(self._replica_of_session))]
        return replica

    async def _ask(self, replica: _Replica, rid: str, body: dict[str, Any]) -> Reply:
        timeout_s = TIMEOUT_S + TIMEOUT_PER_TOKEN_S * body["sampling_params"]["max_new_tokens"]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            url = replica.server.url
            content = json.dumps({"rid": rid if attempt == 1 else f"{rid}#{attempt}", **body}).encode()
            sent_at = time.monotonic()
            try:
                response = await self._watched(replica, url, self._post(url, content), timeout_s)
                return _reply(response, time.monotonic() - sent_at, attempt)
            except (aiohttp.ClientError, OSError, _ServerFault) as error:
                fault = error
            await replica.ensure_alive(url, f"request {rid}, attempt {attempt} of {MAX_ATTEMPTS}: {fault!r}")
            await asyncio.sleep(random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2**attempt)))
        raise RequestFailed(f"{MAX_ATTEMPTS} attempts failed, the last one with {fault!r}") from fault

    async def _post(self, url: str, content: bytes) -> _Response:
        """The response's status and body. Raises: aiohttp.ClientError, OSError."""
        async with self._http.post(f"{url}/generate", data=content) as response:
            return _Response(response.status, await response.read())

    async def _watched(
        self, replica: _Replica, url: str, posting: Coroutine[Any, Any, _Response], timeout_s: float
    ) -> _Response:
        """The response, however long it takes while the server answers others.

        Raises: as `posting`; TimeoutError if it is lost, ServerLost.
        """
        task = asyncio.ensure_future(posting)
        sent_at = time.monotonic()
        try:
            while True:
                silent_at = max(sent_at, replica.heard_at) + SILENCE_S
                if (await asyncio.wait((task,), timeout=max(0.0, silent_at - time.monotonic())))[0]:
                    response = task.result()
                    replica.heard_at = time.monotonic()
                    return response
                if time.monotonic() - sent_at > timeout_s:
                    raise TimeoutError(f"no answer for {timeout_s:.0f} s")
                if time.monotonic() - max(sent_at, replica.heard_at) >= SILENCE_S:
                    await replica.ensure_alive(url, f"it answers nothing for {SILENCE_S:g} s")
                    if replica.server.url != url:
                        raise TimeoutError("the server was deaf, and was started again")
        finally:
            task.cancel()


def _reply(response: _Response, elapsed_s: float, num_attempts: int) -> Reply:
    """What the response says. Raises: RequestRefused, _ServerFault."""
    if response.status != HTTPStatus.OK:
        message = f"status {response.status}: {response.body.decode(errors='replace')}"
        is_final = 400 <= response.status < 500 and response.status not in RETRIED_STATUS
        # A server that outlives its client works on a request until it notices, and the next client asks again.
        if is_final and DUPLICATE not in message:
            raise RequestRefused(f"refused with {message}")
        raise _ServerFault(message)
    answer = json.loads(response.body)
    meta = answer["meta_info"]
    finish = meta["finish_reason"]
    if finish["type"] == "abort":
        if finish.get("status_code") == HTTPStatus.BAD_REQUEST:
            raise RequestRefused(f"refused: {finish['message']}")
        raise _ServerFault(f"aborted: {finish}")
    # Only stop strings, which no request has, end an answer with a text; and logits that are not a number.
    if isinstance(finish.get("matched"), str):
        raise _ServerFault(f"ended by {finish['matched']!r}")
    return Reply(tuple(answer["output_ids"]), finish["type"], meta, elapsed_s, num_attempts)


class Job(NamedTuple):
    """Arguments of `Client.generate`."""

    rid: str
    input_ids: Sequence[int]
    sampling_params: Mapping[str, Any]
    session: str | None = None


class Outcome(NamedTuple):
    """What came of a job."""

    job: Job
    result: Reply | RequestRefused | RequestFailed


def completed(servers: Sequence[Server], jobs: Iterator[Job], *, max_in_flight: int) -> Iterator[Outcome]:
    """Outcomes in the order in which they come, for a caller that is not asynchronous.

    `jobs` is read on the caller's thread, and only while there is room; when it ends it is asked again after each
    outcome, because what the caller does with one may be what brings the next job in. A caller that stops early leaves
    nothing running.

    Raises: ServerLost, and whatever reading `jobs` raises.
    """
    arrived: SimpleQueue[tuple[Job, Future[Reply]]] = SimpleQueue()
    num_in_flight = 0
    with _client_in_thread(servers, max_in_flight) as submit:
        while True:
            while num_in_flight < max_in_flight and (job := next(jobs, None)) is not None:
                submit(job).add_done_callback(lambda future, job=job: arrived.put((job, future)))  # type: ignore[misc]
                num_in_flight += 1
            if num_in_flight == 0:
                return
            job, future = arrived.get()
            num_in_flight -= 1
            try:
                result: Reply | RequestRefused | RequestFailed = future.result()
            except (RequestRefused, RequestFailed) as error:
                result = error
            yield Outcome(job, result)


@contextlib.contextmanager
def _client_in_thread(servers: Sequence[Server], max_in_flight: int) -> Iterator[Callable[[Job], Future[Reply]]]:
    """What hands jobs to a client whose event loop has a thread of its own; what the end finds in flight is dropped."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="requests", daemon=True)
    thread.start()
    client = Client(servers, max_in_flight=max_in_flight)

    async def close() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.__aexit__()

    try:
        asyncio.run_coroutine_threadsafe(client.__aenter__(), loop).result()
        yield lambda job: asyncio.run_coroutine_threadsafe(client.generate(*job), loop)
    finally:
        asyncio.run_coroutine_threadsafe(close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
