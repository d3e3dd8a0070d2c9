"""What a server can do at most: a client that sends all requests at once and does nothing else. Torch-free."""

import asyncio
import json
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

import aiohttp

MAX_CONNECTIONS = 512
"""Many times what a server works on at once, and within the usual limit of open files."""


class RawRequest(NamedTuple):
    """A prompt, and exactly how many tokens are to be written behind it."""

    rid: str
    input_ids: Sequence[int]
    num_new_tokens: int


class Saturation(NamedTuple):
    """What came of a saturated server."""

    num_prompt_tokens: int
    num_output_tokens: int
    elapsed_s: float
    """From the first request to the last answer."""


def saturate(url: str, requests: Sequence[RawRequest]) -> Saturation:
    """All requests at once, answered.

    Raises: RuntimeError for a request that is not answered in full, or not at the first attempt.
    """
    bodies = [
        json.dumps(
            {
                "rid": request.rid,
                "input_ids": request.input_ids,
                "sampling_params": {
                    "max_new_tokens": request.num_new_tokens,
                    "temperature": 0.0,
                    # The answer goes on behind its end: each pass has the same work.
                    "ignore_eos": True,
                },
            }
        ).encode()
        for request in requests
    ]
    answers, elapsed_s = asyncio.run(_post_all(f"{url}/generate", bodies))
    num_prompt_tokens = num_output_tokens = 0
    # Read behind the clock.
    for request, answer in zip(requests, map(json.loads, answers), strict=True):
        num_read, num_written = answer["meta_info"]["prompt_tokens"], len(answer["output_ids"])
        if num_read != len(request.input_ids) or num_written < request.num_new_tokens:
            raise RuntimeError(
                f"request {request.rid} has {len(request.input_ids)} tokens and asks for {request.num_new_tokens}; "
                f"the server read {num_read} and wrote {num_written}: {answer['meta_info']}"
            )
        num_prompt_tokens += len(request.input_ids)
        num_output_tokens += request.num_new_tokens
    return Saturation(num_prompt_tokens, num_output_tokens, elapsed_s)


async def _post_all(url: str, bodies: Sequence[bytes]) -> tuple[list[bytes], float]:
    connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS)
    timeout: Any = aiohttp.ClientTimeout(total=None)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as http:

        async def post(body: bytes) -> bytes:
            async with http.post(url, data=body) as response:
                content = await response.read()
                if response.status != HTTPStatus.OK:
                    raise RuntimeError(f"{url} answers status {response.status}: {content.decode(errors='replace')}")
                return content

        started_at = time.perf_counter()
        answers = await asyncio.gather(*map(post, bodies))
        return answers, time.perf_counter() - started_at
