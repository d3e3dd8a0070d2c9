"""A target behind SGLang servers. This process has its tokenizer and its config, and none of its weights."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from transformers import AutoConfig, GenerationConfig

from specforge_core.benchmark.client import Job, Reply, completed, sampling_params, within_context
from specforge_core.benchmark.server import Server
from specforge_core.data.chat_template import load_tokenizer
from specforge_core.stages import ResolvedTarget
from specforge_core.targets import Completion, GenerationRequest, Refusal, Sampling

SPARE_IN_FLIGHT = 8
"""One request in so many, on top of what a server decodes at once: the next one is there when a place becomes free."""


def num_in_flight(max_running_requests: int, num_servers: int) -> int:
    """Requests to have in flight so that each of the servers always has enough to do."""
    return num_servers * (max_running_requests + -(-max_running_requests // SPARE_IN_FLIGHT))


class SGLangTarget:
    """A target that all of these servers serve."""

    def __init__(self, target: ResolvedTarget, servers: Sequence[Server]) -> None:
        origin = {"revision": target.revision or "main", "trust_remote_code": target.trust_remote_code}
        self.servers = tuple(servers)
        self.tokenizer = load_tokenizer(target)
        self.config = AutoConfig.from_pretrained(target.model, **origin).get_text_config()
        self.eos_token_ids = self._eos_token_ids(target)

    def generate(
        self, requests: Iterable[GenerationRequest], sampling: Sampling, *, batch_size: int
    ) -> Iterator[Completion | Refusal]:
        """Completions in the order in which they finish, `batch_size` requests in flight. Raises: ServerLost.

        The turns of a conversation are asked of one server: their ids differ only behind the last slash.
        """
        # A map can go on when its iterator does; a generator cannot.
        jobs = map(partial(self._job, sampling), requests)
        for job, result in completed(self.servers, jobs, max_in_flight=batch_size):
            if isinstance(result, Reply):
                reply = result.ended(self.eos_token_ids)
                yield Completion(job.rid, reply.token_ids, reply.finish_reason)
            else:
                yield Refusal(job.rid, str(result))

    def _job(self, sampling: Sampling, request: GenerationRequest) -> Job:
        """The request as the server takes it."""
        limited = within_context(sampling, request, self.config.max_position_embeddings)
        conversation = request.id.rpartition("/")[0]
        return Job(request.id, request.input_ids, sampling_params(limited, request.id), conversation or None)

    def _eos_token_ids(self, target: ResolvedTarget) -> frozenset[int]:
        """Tokens that end an answer: by the config, the generation config and the tokenizer, as the server does."""
        listed = [self.tokenizer.eos_token_id, self.config.eos_token_id]
        # A target may come without a generation config.
        with contextlib.suppress(OSError):
            generation_config = GenerationConfig.from_pretrained(target.model, revision=target.revision or "main")
            listed.append(generation_config.eos_token_id)
        ids = (token_ids if isinstance(token_ids, list) else [token_ids] for token_ids in listed)
        return frozenset(token_id for token_ids in ids for token_id in token_ids if token_id is not None)
