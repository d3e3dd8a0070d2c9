"""One suite at one serving configuration: decoded without and with draft in turns, on the same prompts.

The prompts are dealt to `repeats` rounds, and each round is timed without and with draft, one right after the other, in
alternating order. So a machine that gets slower meanwhile slows both sides, every prompt is decoded once on each side
whatever `repeats` is, and the interval over the rounds covers different prompts as well as timing noise. Times include
the prefill, of target and draft. Acceptance and losslessness come from the same, timed runs.

Who decodes does not matter here: the loop of this process (`in_process.py`) or servers (`served.py`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from specforge_core.benchmark.answers import check_answer
from specforge_core.benchmark.interval import median_interval
from specforge_core.benchmark.lossless import LosslessCheck
from specforge_core.decoding.speculative import Generation
from specforge_core.digests import digest
from specforge_core.facts import Answers, Lossless, Measurement, PromptSums
from specforge_core.manifest_sections import AnswerKind, ServingConfig
from specforge_core.progress import progress
from specforge_core.targets import GenerationRequest, Sampling

WARM_UP_TOKENS = 8
UNTIMED_BATCH_SIZE = 16
"""Requests at once where only the answers matter."""


class AnswerKey(NamedTuple):
    """What the answers of a suite are checked against."""

    kind: AnswerKind
    references: Mapping[str, str]
    """By request id; not every request needs one."""


class Workload(NamedTuple):
    """What is measured, and how often."""

    suite: str
    requests: Sequence[GenerationRequest]
    sampling: Sampling
    serving: ServingConfig
    repeats: int
    answer_key: AnswerKey | None = None
    """None: answers are not checked."""

    def __str__(self) -> str:
        return f"{self.suite} {self.serving.chain()} at concurrency {self.serving.concurrency}"

    def parts(self) -> list[Sequence[GenerationRequest]]:
        """The requests of each round."""
        return deal(self.requests, num_parts=self.repeats, min_size=self.serving.concurrency)


class Timing(NamedTuple):
    """When a request of a run was sent."""

    started_s: float
    """After the first one."""
    attempt: int
    """At the whole run: a disturbed one is made again."""


class Run(NamedTuple):
    """Requests decoded together, and how long all of them took."""

    generations: dict[str, Generation]
    """By request id."""
    elapsed_s: float
    timings: Mapping[str, Timing] = MappingProxyType({})
    """By request id; of servers alone."""

    @property
    def output_tokens_per_s(self) -> float:
        """Of all requests together."""
        return add_up(self.generations.values()).num_output_tokens / self.elapsed_s


class Decode(Protocol):
    """One side: it decodes requests at the workload's concurrency, and calls `advance` after each."""

    def __call__(
        self, workload: Workload, requests: Sequence[GenerationRequest], advance: Callable[[], object]
    ) -> Run: ...


class Rounds(NamedTuple):
    """The same requests without and with draft, one run a round each."""

    baseline: Sequence[Run]
    speculative: Sequence[Run]

    def speedups(self) -> list[float]:
        """By round; of tokens per second, because sampled answers differ in length."""
        return [
            speculative.output_tokens_per_s / baseline.output_tokens_per_s
            for baseline, speculative in zip(self.baseline, self.speculative, strict=True)
        ]


class Sums(NamedTuple):
    """Over generations; named as in `Measurement`."""

    num_output_tokens: int
    num_verify_steps: int
    accepted_by_position: tuple[int, ...]


def timed_runs(workload: Workload, sides: Sequence[Decode]) -> list[list[Run]]:
    """The runs of each side, one a round, after a short warm-up of all. Who begins a round takes turns."""
    parts = workload.parts()
    warm_up = workload._replace(sampling=workload.sampling._replace(max_new_tokens=WARM_UP_TOKENS))
    for side in sides:
        side(warm_up, parts[0][: workload.serving.concurrency], lambda: None)
    runs: list[list[Run]] = [[] for _ in sides]
    total = len(sides) * sum(map(len, parts))
    with progress(desc=f"benchmark {workload}", total=total, unit="answer") as bar:
        for number, part in enumerate(parts):
            order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
            for index in order:
                runs[index].append(sides[index](workload, part, bar.update))
    return runs


def deal(requests: Sequence[GenerationRequest], *, num_parts: int, min_size: int) -> list[Sequence[GenerationRequest]]:
    """The requests in order, in parts of nearly one size, at least `min_size`.

    Where there are too few for that, they are gone through again and again, and no part has a request twice.
    """
    count = len(requests)
    if count >= num_parts * min_size:
        return [requests[part * count // num_parts : (part + 1) * count // num_parts] for part in range(num_parts)]
    size = min(count, min_size)
    return [[requests[(part * size + i) % count] for i in range(size)] for part in range(num_parts)]


def first_answers(runs: Iterable[Run]) -> dict[str, Generation]:
    """By request id; a request that is in several runs counts once, as it was decoded first."""
    return {id: generation for run in reversed(list(runs)) for id, generation in run.generations.items()}


def add_up(generations: Iterable[Generation]) -> Sums:
    """Sums over generations."""
    tokens, steps, accepted = zip(
        *((len(g.completion.token_ids), g.num_verify_steps, g.accepted_by_position) for g in generations), strict=True
    )
    return Sums(sum(tokens), sum(steps), tuple(map(sum, zip(*accepted, strict=True))))


def acceptance_length(generations: Iterable[Generation]) -> float | None:
    """Tokens per verification step; None if there was no step."""
    sums = add_up(generations)
    return sums.num_output_tokens / sums.num_verify_steps if sums.num_verify_steps else None


def sums_with_draft(workload: Workload, speculative: Mapping[str, Generation]) -> Sums:
    """Their sums. Raises: ValueError if every answer is a single token: then no draft took part."""
    sums = add_up(speculative.values())
    if not sums.num_verify_steps:
        raise ValueError(f"suite {workload.suite}: every answer is a single token, which no draft can make faster")
    return sums


def summarise(workload: Workload, rounds: Rounds, tokenizer: PreTrainedTokenizerBase) -> Measurement:
    """The measurement that follows from the rounds alone: without `lossless`, and without what others reach.

    Raises: ValueError if every answer is a single token: then no draft took part.
    """
    speculative = first_answers(rounds.speculative)
    sums = sums_with_draft(workload, speculative)
    speedup = median_interval(rounds.speedups())
    return Measurement(
        suite=workload.suite,
        serving=workload.serving,
        num_prompts=len(speculative),
        **sums._asdict(),
        prompts=_prompt_sums(speculative),
        baseline_output_tokens_per_s=tuple(run.output_tokens_per_s for run in rounds.baseline),
        output_tokens_per_s=tuple(run.output_tokens_per_s for run in rounds.speculative),
        speedup=speedup.value,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        lossless=None,
        answers=_answers(workload.answer_key, rounds, tokenizer) if workload.answer_key else None,
    )


def _prompt_sums(speculative: Mapping[str, Generation]) -> PromptSums:
    # Answers come in any order.
    ids = sorted(speculative)
    generations = [speculative[id] for id in ids]
    return PromptSums(
        ids_digest=digest(ids),
        num_output_tokens=tuple(len(generation.completion.token_ids) for generation in generations),
        num_verify_steps=tuple(generation.num_verify_steps for generation in generations),
    )


def _answers(key: AnswerKey, rounds: Rounds, tokenizer: PreTrainedTokenizerBase) -> Answers:
    baseline, speculative = first_answers(rounds.baseline), first_answers(rounds.speculative)

    def num_correct(generations: Mapping[str, Generation]) -> int:
        return sum(
            check_answer(
                key.kind, tokenizer.decode(g.completion.token_ids, skip_special_tokens=True), key.references[id]
            )
            for id, g in generations.items()
            if id in key.references
        )

    return Answers(
        num_checked=len(speculative.keys() & key.references.keys()),
        num_correct=num_correct(speculative),
        num_correct_without_draft=num_correct(baseline),
    )


def lossless_counts(check: LosslessCheck, workload: Workload, rounds: Rounds) -> Lossless | None:
    """How many prompts have the same answer with draft as without; None for sampled answers."""
    if workload.sampling.temperature > 0.0:
        return None
    baseline, speculative = first_answers(rounds.baseline), first_answers(rounds.speculative)
    verdicts = [
        check.verdict(
            request.input_ids,
            baseline[request.id].completion.token_ids,
            speculative[request.id].completion.token_ids,
        )
        for request in workload.requests
    ]
    return Lossless(
        num_identical=verdicts.count("identical"),
        num_near_tie=verdicts.count("near_tie"),
        num_different=verdicts.count("different"),
    )
