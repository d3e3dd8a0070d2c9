"""A closed-loop load on one server: so many workers, each of which sends its next request when its last is answered.

Throughput is output tokens over the time from the first request to the last answer. A run with a request that had to be
sent again, because the server died or broke down over it, says nothing about speed.

What counts as a verification step, and as a token of the answer, is as in `decoding.speculative.Generation`: SGLang's
`spec_accept_length` is defined alike. One thing differs: SGLang's histogram counts tokens that a last step accepts
behind the answer's end, too.
"""

import asyncio
import logging
import time
import urllib.error
from collections.abc import Callable, Sequence
from typing import NamedTuple

from specforge_core.benchmark.client import Client, Reply, sampling_params, within_context
from specforge_core.benchmark.measure import Decode, Run, Timing, Workload
from specforge_core.benchmark.server import Server, ServerLost, http_request
from specforge_core.decoding.speculative import Generation
from specforge_core.targets import Completion, GenerationRequest, Sampling

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 30.0
"""How long a server may take to come to rest. Overlapped scheduling finishes a step after the last answer."""
MAX_FLUSHES = 3
MAX_RUNS = 3
"""Of the same requests: a server that breaks down in each of them is not measured."""


class ServedModel(NamedTuple):
    """What a client must know about what a server serves."""

    eos_token_ids: frozenset[int]
    context_length: int
    num_steps: int
    """Of the draft; 0 without one."""


class Answered(NamedTuple):
    """One request of a run."""

    generation: Generation
    """Its `elapsed_s` is from sending the request to its answer."""
    started_s: float
    """When it was sent, after the first one of the run."""
    num_attempts: int


class LoadRun(NamedTuple):
    """All requests of a run."""

    answered: tuple[Answered, ...]
    """In the order of their answers."""
    elapsed_s: float

    @property
    def is_undisturbed(self) -> bool:
        """Whether every request was answered at the first attempt."""
        return all(one.num_attempts == 1 for one in self.answered)


def served_side(server: Server, model: ServedModel) -> Decode:
    """A server at the workload's concurrency, its cache empty at the start of each run.

    A disturbed run is made again, after a warm-up: a server that was just started is slow at first.
    """

    def load(workload: Workload, requests: Sequence[GenerationRequest], advance: Callable[[], object]) -> LoadRun:
        flush_cache(server)
        concurrency = workload.serving.concurrency
        return run_load(server, model, requests, workload.sampling, concurrency=concurrency, advance=advance)

    def decode(workload: Workload, requests: Sequence[GenerationRequest], advance: Callable[[], object]) -> Run:
        for attempt in range(1, MAX_RUNS + 1):
            run = load(workload, requests, advance)
            if run.is_undisturbed:
                return Run(
                    generations={one.generation.completion.id: one.generation for one in run.answered},
                    elapsed_s=run.elapsed_s,
                    timings={one.generation.completion.id: Timing(one.started_s, attempt) for one in run.answered},
                )
            logger.warning(
                "%s: requests had to be sent again, so this run (attempt %d of %d) says nothing about speed",
                workload,
                attempt,
                MAX_RUNS,
            )
            load(workload, requests[: workload.serving.concurrency], lambda: None)
        raise ServerLost(f"{workload}: no run of {MAX_RUNS} went through without a disturbance; see the server's log")

    return decode


def run_load(
    server: Server,
    model: ServedModel,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    *,
    concurrency: int,
    advance: Callable[[], object],
) -> LoadRun:
    """A timed run, `concurrency` requests in flight as long as there are so many.

    Args: requests: no two with one id; advance: called after each answer.
    Raises: ValueError for a request that the server refuses, or figures that a draft must have and this one has not;
    ServerLost, RequestFailed.
    """
    return asyncio.run(_closed_loop(server, model, requests, sampling, concurrency, advance))


async def _closed_loop(
    server: Server,
    model: ServedModel,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    concurrency: int,
    advance: Callable[[], object],
) -> LoadRun:
    pending, answered = iter(requests), []
    async with Client((server,), max_in_flight=concurrency) as client:
        started_at = time.perf_counter()

        async def work() -> None:
            # All workers take from one iterator.
            for request in pending:
                limited = within_context(sampling, request, model.context_length)
                sent_at = time.perf_counter()
                reply = await client.generate(request.id, request.input_ids, sampling_params(limited, request.id))
                elapsed_s = time.perf_counter() - sent_at
                generation = generation_of(request.id, reply, model, elapsed_s)
                answered.append(Answered(generation, sent_at - started_at, reply.num_attempts))
                advance()

        workers = [asyncio.ensure_future(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return LoadRun(tuple(answered), time.perf_counter() - started_at)


def generation_of(request_id: str, reply: Reply, model: ServedModel, elapsed_s: float) -> Generation:
    """A server's reply, in the words of the loop of this process.

    Raises: ValueError if a server with a draft reports no verification steps.
    """
    ended = reply.ended(model.eos_token_ids)
    completion = Completion(request_id, ended.token_ids, ended.finish_reason)
    num_tokens = len(ended.token_ids)
    if not model.num_steps:
        return Generation(completion, max(0, num_tokens - 1), (), elapsed_s)
    # The prefill gives the first token, and an answer of one token is no step of the draft.
    if "spec_verify_ct" not in reply.meta and num_tokens > 1:
        raise ValueError(
            f"the server with draft answered request {request_id} with {num_tokens} tokens and reports no "
            "spec_verify_ct: it does not draft. See its log for why, or use an SGLang that reports it (0.5.14 does)"
        )
    histogram = reply.meta.get("spec_correct_drafts_histogram", [])
    accepted_by_position = tuple(sum(histogram[position + 1 :]) for position in range(model.num_steps))
    return Generation(completion, reply.meta.get("spec_verify_ct", 0), accepted_by_position, elapsed_s)


def flush_cache(server: Server) -> None:
    """Make the server forget all keys and values, so that the next run computes every prompt.

    Raises: RuntimeError if it does not, ServerLost.
    """
    for _ in range(MAX_FLUSHES):
        try:
            http_request(f"{server.url}/flush_cache?timeout={FLUSH_TIMEOUT_S}", 2 * FLUSH_TIMEOUT_S, method="POST")
        except urllib.error.HTTPError:
            # Older versions do not wait by themselves.
            time.sleep(1.0)
        except OSError as error:
            logger.warning("the cache of %s cannot be flushed: %r", server.url, error)
            server.ensure_alive()
        else:
            return
    raise RuntimeError(f"{server.url} did not flush its cache in {MAX_FLUSHES} attempts: see its log")
