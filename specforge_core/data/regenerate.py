"""Stage `regenerate`: the target answers every user turn of the prompts itself.

A conversation is a pure function of its prompt and of what the journal holds, `Regeneration.advance`. Answers go into
the journal as they come; the stage asks for those that are missing, and in the end replays all prompts in order. So a
resumed stage writes what an undisturbed one writes, as far as the target's arithmetic does not depend on which requests
share a batch.
"""

import contextlib
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from specforge_core.artifacts import METRICS_NAME, PROGRESS_DIRECTORY
from specforge_core.benchmark.server import ServerLost
from specforge_core.data.chat_template import chat_template_sha256, next_turn_ids, prompt_ids
from specforge_core.data.conversations import Conversation, write_conversations
from specforge_core.data.journal import Journal
from specforge_core.data.prompts import Message, Prompt, UnusableRow, read_rows
from specforge_core.facts import Conversations
from specforge_core.manifest_sections import DataConfig
from specforge_core.progress import progress
from specforge_core.stages import RegenerateSpec
from specforge_core.targets import Completion, GenerationRequest, Refusal, Sampling, TargetBackend

logger = logging.getLogger(__name__)

JOURNAL_NAME = "journal.jsonl"
METRICS_INTERVAL_S = 10.0
MAX_REASONS_LOGGED = 10
MAX_FAILURES_AHEAD = 32
"""A backend that has failed so many more requests than it has answered is broken, not its requests."""
PROBE_PROMPT_TOKENS = 16


class Failure(NamedTuple):
    """A prompt that gave no conversation."""

    reason: str


class InFlight(NamedTuple):
    """A request that the backend has taken, and whose conversation waits for it."""

    prompt: Prompt
    request: GenerationRequest


class Prompts(NamedTuple):
    """What is there to be asked."""

    usable: tuple[Prompt, ...]
    """No two with the same messages."""
    unusable: Counter[str]
    """Rows that hold no prompt, by reason."""


def main(spec: RegenerateSpec, out: Path) -> Conversations:
    """The facts of the conversations written to `out`. Raises: as `regenerate`, and ServerLost."""
    return _served(spec, out) if spec.engine.name == "sglang" else _in_process(spec, out)


def _served(spec: RegenerateSpec, out: Path) -> Conversations:
    from specforge_core.benchmark.server_flags import target_options
    from specforge_core.benchmark.stage_servers import stage_servers
    from specforge_core.targets.sglang import SGLangTarget, num_in_flight

    engine = spec.engine
    with stage_servers(engine, target_options(spec.target, engine), name="target", directory=out) as servers:
        target = SGLangTarget(spec.target, servers)
        batch_size = num_in_flight(engine.max_running_requests, len(servers))
        return regenerate(spec.model_copy(update={"batch_size": batch_size}), target, target.tokenizer, out)


def _in_process(spec: RegenerateSpec, out: Path) -> Conversations:
    # `regenerate` works with any backend; this one is the most expensive to import.
    from specforge_core.decoding.threads import fastest_num_threads, torch_threads
    from specforge_core.targets.hf import HFTarget

    target = HFTarget(spec.target, device=spec.device)
    # As many rows as there will be; what they say does not matter.
    probe = [GenerationRequest(str(row), [0] * PROBE_PROMPT_TOKENS) for row in range(spec.batch_size)]
    with torch_threads(fastest_num_threads(target, probe)):
        return regenerate(spec, target, target.tokenizer, out)


def regenerate(
    spec: RegenerateSpec, target: TargetBackend, tokenizer: PreTrainedTokenizerBase, out: Path
) -> Conversations:
    """The facts of the conversations written to `out`, which may hold the journal of an interrupted run.

    Raises: ValueError if the tokenizer has no chat template, a source has no prompts, or the journal is another
    spec's; RuntimeError if more than half of the rows give no conversation; ServerLost from a backend with servers.
    """
    template_sha256 = chat_template_sha256(tokenizer)
    prompts = unique_prompts(spec.data)
    with contextlib.closing(Journal(out / PROGRESS_DIRECTORY / JOURNAL_NAME, key=spec.key())) as journal:
        regeneration = Regeneration(spec, target, tokenizer, journal)
        regeneration.answer(prompts.usable, out / METRICS_NAME)
        counts = write_conversations(out, regeneration.conversations(prompts.usable))
    failures = prompts.unusable + regeneration.failures
    for reason, num_rows in failures.most_common(MAX_REASONS_LOGGED):
        logger.warning("%d rows gave no conversation: %s", num_rows, reason)
    if failures.total() > counts.num_conversations:
        raise RuntimeError(
            f"{failures.total()} rows gave no conversation and only {counts.num_conversations} did; "
            f"most often: {failures.most_common(1)[0][0]}"
        )
    return Conversations(**counts._asdict(), num_failed=failures.total(), chat_template_sha256=template_sha256)


def unique_prompts(data: DataConfig) -> Prompts:
    """The prompts of all sources in order, the first of equal ones.

    Raises: ValueError if there are none, or fewer than rows that hold none.
    """
    usable: dict[str, Prompt] = {}
    unusable: Counter[str] = Counter()
    num_duplicates = 0
    for source in data.sources:
        for row in read_rows(source):
            if isinstance(row, UnusableRow):
                unusable[row.reason] += 1
            elif row.id in usable:
                num_duplicates += 1
            else:
                usable[row.id] = row
    logger.info(
        "%d prompts; %d duplicates and %d unusable rows left out", len(usable), num_duplicates, unusable.total()
    )
    if not usable:
        raise ValueError(f"the data sources hold no usable prompt: {dict(unusable) or 'no rows at all'}")
    if unusable.total() > len(usable):
        # The stage would end so in any case, once all answers are paid for.
        raise ValueError(
            f"{unusable.total()} rows of the data sources hold no usable prompt and only {len(usable)} different ones "
            f"do; most often: {unusable.most_common(1)[0][0]}. Remove those rows, or name the `column` with the prompts"
        )
    return Prompts(tuple(usable.values()), unusable)


def num_questions(prompt: Prompt) -> int:
    """User turns, each of which the target is to answer."""
    return sum(message["role"] == "user" for message in prompt.messages)


class Regeneration:
    """The target's answers to prompts, and the conversations that they make."""

    def __init__(
        self, spec: RegenerateSpec, target: TargetBackend, tokenizer: PreTrainedTokenizerBase, journal: Journal
    ) -> None:
        self.target = target
        self.tokenizer = tokenizer
        self.journal = journal
        self.batch_size = spec.batch_size
        self.max_prompt_tokens = spec.data.max_prompt_tokens
        self.sampling = Sampling(
            spec.data.max_new_tokens, temperature=spec.data.temperature, top_p=spec.data.top_p, seed=spec.data.seed
        )
        self.waiting: deque[Prompt] = deque()
        self.in_flight: dict[str, InFlight] = {}
        self.failed_requests: dict[str, str] = {}
        """Why the backend did not answer, by request id. In memory only: a resumed run asks again."""
        self.failures: Counter[str] = Counter()
        """Prompts that gave no conversation, by reason."""

    def advance(self, prompt: Prompt) -> GenerationRequest | Conversation | Failure:
        """Where the answers so far have led: to the next request, or to an end.

        A conversation ends after its last turn, an answer that was cut off (the target never ended its turn), or
        before a turn that cannot be asked or that got no answer.
        """
        messages: list[Message] = [message for message in prompt.messages if message["role"] == "system"]
        questions = [message for message in prompt.messages if message["role"] == "user"]
        input_ids: list[int] = []
        loss_mask: list[bool] = []
        finish_reasons: list[str] = []
        failure: Failure | None = None
        for turn, question in enumerate(questions):
            request_id = f"{prompt.id}/{turn}"
            messages.append(question)
            if request_id not in self.journal:
                request = self._request(request_id, messages, input_ids)
                if isinstance(request, GenerationRequest):
                    return request
                failure = request
                break
            exchange = self.journal[request_id]
            answer = self.tokenizer.decode(exchange.answer_ids, skip_special_tokens=True)
            if not answer.strip():
                failure = Failure("an empty answer")
                break
            messages.append({"role": "assistant", "content": answer})
            loss_mask += [False] * (len(exchange.prompt_ids) - len(input_ids)) + [True] * len(exchange.answer_ids)
            input_ids = [*exchange.prompt_ids, *exchange.answer_ids]
            finish_reasons.append(exchange.finish_reason)
            if exchange.finish_reason == "length":
                break
        if not finish_reasons:
            assert failure is not None
            return failure
        if messages[-1]["role"] == "user":
            messages.pop()
        return Conversation(
            id=prompt.id,
            source=prompt.source,
            messages=tuple(messages),
            input_ids=tuple(input_ids),
            loss_mask=tuple(loss_mask),
            finish_reasons=tuple(finish_reasons),
        )

    def _request(
        self, request_id: str, messages: Sequence[Message], input_ids: list[int]
    ) -> GenerationRequest | Failure:
        """The request for an answer to the last message, or why it cannot be made or got no answer.

        Its prompt is `input_ids`, the conversation so far, and what leads to the answer; the limit is on both together.
        """
        if request_id in self.failed_requests:
            return Failure(self.failed_requests[request_id])
        try:
            if not input_ids:
                added_ids: list[int] | None = prompt_ids(self.tokenizer, messages)
            else:
                added_ids = next_turn_ids(self.tokenizer, messages, end_id=input_ids[-1])
        except jinja2.TemplateError as error:
            return Failure(f"the chat template refuses it: {error}")
        if added_ids is None:
            return Failure("the chat template does not keep the history")
        if len(input_ids) + len(added_ids) > self.max_prompt_tokens:
            return Failure(f"the prompt is longer than max_prompt_tokens={self.max_prompt_tokens}")
        return GenerationRequest(request_id, (*input_ids, *added_ids))

    def conversations(self, prompts: Sequence[Prompt]) -> Iterator[Conversation]:
        """The finished conversations in the order of their prompts; the others are counted in `failures`."""
        num_shortened = 0
        for prompt in progress(prompts, desc="write conversations", unit="conversation"):
            outcome = self.advance(prompt)
            assert not isinstance(outcome, GenerationRequest)
            if isinstance(outcome, Failure):
                self.failures[outcome.reason] += 1
                continue
            num_shortened += len(outcome.finish_reasons) < num_questions(prompt)
            yield outcome
        if num_shortened:
            logger.info("%d conversations end before the last turn of their prompt", num_shortened)

    def answer(self, prompts: Sequence[Prompt], metrics_path: Path) -> None:
        """Have every turn answered that can be, and journaled.

        Args: metrics_path: gets a line every METRICS_INTERVAL_S and a last one: conversations done, tokens and speed.
        Raises: RuntimeError if the backend fails nearly all requests, ServerLost.
        """
        self.waiting.extend(prompts)
        started_at = reported_at = time.monotonic()
        num_tokens = 0
        with progress(desc="regenerate", total=len(prompts), unit="conversation") as bar:
            while self.waiting:
                for outcome in self._outcomes(bar):
                    prompt, request = self.in_flight.pop(outcome.id)
                    # To the front: a conversation that has begun is finished before another one begins, and the server
                    # still knows its keys and values.
                    self.waiting.appendleft(prompt)
                    if isinstance(outcome, Refusal):
                        self._record_failure(outcome)
                        continue
                    self.journal.append(request, outcome)
                    num_tokens += len(outcome.token_ids)
                    bar.set_postfix_str(f"{num_tokens:,} tokens", refresh=False)
                    if time.monotonic() - reported_at > METRICS_INTERVAL_S:
                        reported_at = time.monotonic()
                        _append_metrics(metrics_path, bar.n, num_tokens, reported_at - started_at)
            _append_metrics(metrics_path, bar.n, num_tokens, time.monotonic() - started_at)

    def _next_request(self, bar: Any) -> GenerationRequest | None:
        """The next request of the first conversation that waits, if one does."""
        while self.waiting:
            prompt = self.waiting.popleft()
            outcome = self.advance(prompt)
            if isinstance(outcome, GenerationRequest):
                self.in_flight[outcome.id] = InFlight(prompt, outcome)
                return outcome
            bar.update()
        return None

    def _outcomes(self, bar: Any) -> Iterator[Completion | Refusal]:
        """What comes of all that waits. Requests that a backend loses together are asked again one by one."""
        requests = _Requests(lambda: self._next_request(bar))
        # Whatever a backend raises about one request, the others must go on.
        try:
            yield from self.target.generate(requests, self.sampling, batch_size=self.batch_size)
        except ServerLost:
            raise
        except Exception as error:
            logger.warning("%d requests failed together, asking them one by one: %r", len(self.in_flight), error)
        for _, request in tuple(self.in_flight.values()):
            reason = "the backend gave no completion"
            try:
                yield from self.target.generate([request], self.sampling, batch_size=1)
            except ServerLost:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            if request.id in self.in_flight:
                yield Refusal(request.id, reason)

    def _record_failure(self, refusal: Refusal) -> None:
        self.failed_requests[refusal.id] = refusal.reason
        if len(self.failed_requests) > len(self.journal) + MAX_FAILURES_AHEAD:
            raise RuntimeError(
                f"the backend failed {len(self.failed_requests)} requests and answered {len(self.journal)}; "
                f"the last reason: {refusal.reason}"
            )


class _Requests(Iterator[GenerationRequest]):
    """What a function gives, up to None. Unlike a generator it can go on after its end, as `TargetBackend` asks for."""

    def __init__(self, next_request: Callable[[], GenerationRequest | None]) -> None:
        self._next_request = next_request

    def __next__(self) -> GenerationRequest:
        if (request := self._next_request()) is None:
            raise StopIteration
        return request


def _append_metrics(path: Path, num_conversations: int, num_tokens: int, elapsed_s: float) -> None:
    metrics = {
        "step": num_conversations,
        "regenerate/tokens": num_tokens,
        "regenerate/tokens_per_s": num_tokens / elapsed_s,
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
