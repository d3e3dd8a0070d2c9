"""One suite at one serving configuration: decoded without and with draft in turns, on the same prompts.

The prompts are dealt to `repeats` rounds, and each round is timed without and with draft, one right after the other, in
alternating order. So a machine that gets slower meanwhile slows both sides, every prompt is decoded once on each side
whatever `repeats` is, and the interval over the rounds covers different prompts as well as timing noise. Times include
the prefill, of target and draft. Acceptance and losslessness come from the same, timed runs.
"""

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from specforge_core.benchmark.interval import median_interval
from specforge_core.benchmark.lossless import LosslessCheck
from specforge_core.decoding.drafters import Drafter
from specforge_core.decoding.speculative import Generation, generate
from specforge_core.facts import Lossless, Measurement
from specforge_core.manifest_sections import ServingConfig
from specforge_core.progress import progress
from specforge_core.targets import GenerationRequest, Sampling
from specforge_core.targets.hf import HFTarget

WARM_UP_TOKENS = 8
UNTIMED_BATCH_SIZE = 16
"""Requests at once where only the answers matter."""


class Subject(NamedTuple):
    """What is measured: a target, its draft, and the drafter to beat."""

    target: HFTarget
    drafter: Drafter
    ngram_drafter: Drafter
    check: LosslessCheck


class Workload(NamedTuple):
    """What it is measured on."""

    suite: str
    requests: Sequence[GenerationRequest]
    sampling: Sampling
    serving: ServingConfig
    repeats: int


class Run(NamedTuple):
    """Requests decoded together, and how long all of them took."""

    generations: dict[str, Generation]
    """By request id."""
    elapsed_s: float

    @property
    def output_tokens_per_s(self) -> float:
        return add_up(self.generations.values()).num_output_tokens / self.elapsed_s


class Round(NamedTuple):
    """The same requests without and with draft."""

    baseline: Run
    speculative: Run

    @property
    def speedup(self) -> float:
        """By tokens per second, because sampled answers differ in length."""
        return self.speculative.output_tokens_per_s / self.baseline.output_tokens_per_s


class Sums(NamedTuple):
    """Over generations; named as in `Measurement`."""

    num_output_tokens: int
    num_verify_steps: int
    accepted_by_position: tuple[int, ...]


class Recorder(Protocol):
    """Takes every single generation; `drafter` is None, `draft` or `ngram`."""

    def __call__(self, workload: Workload, drafter: str | None, generation: Generation) -> None: ...


def measure(subject: Subject, workload: Workload, record: Recorder) -> Measurement:
    """The measurement of a workload. Raises: ValueError if every answer is a single token: then no draft took part."""
    rounds = timed_rounds(subject, workload)
    # The latest first: a prompt that is in several rounds counts once, as it was decoded first.
    baseline, speculative = (
        {request_id: generation for run in reversed(runs) for request_id, generation in run.generations.items()}
        for runs in zip(*rounds, strict=True)
    )
    ngram = decode(subject.target, workload, workload.requests, subject.ngram_drafter, batch_size=UNTIMED_BATCH_SIZE)
    for name, generations in ((None, baseline), ("draft", speculative), ("ngram", ngram.generations)):
        for generation in generations.values():
            record(workload, name, generation)
    sums, ngram_sums = add_up(speculative.values()), add_up(ngram.generations.values())
    if not sums.num_verify_steps:
        raise ValueError(f"suite {workload.suite}: every answer is a single token, which no draft can make faster")
    speedup = median_interval([round.speedup for round in rounds])
    return Measurement(
        suite=workload.suite,
        serving=workload.serving,
        num_prompts=len(speculative),
        **sums._asdict(),
        ngram_acceptance_length=ngram_sums.num_output_tokens / ngram_sums.num_verify_steps,
        baseline_output_tokens_per_s=tuple(round.baseline.output_tokens_per_s for round in rounds),
        output_tokens_per_s=tuple(round.speculative.output_tokens_per_s for round in rounds),
        speedup=speedup.median,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        lossless=compare(subject.check, workload, baseline, speculative),
    )


def timed_rounds(subject: Subject, workload: Workload) -> list[Round]:
    """The rounds of a workload, after a short warm-up of both sides."""
    batch_size = workload.serving.concurrency
    parts = deal(workload.requests, num_parts=workload.repeats, min_size=batch_size)
    warm_up = workload._replace(sampling=workload.sampling._replace(max_new_tokens=WARM_UP_TOKENS))
    for drafter in (None, subject.drafter):
        decode(subject.target, warm_up, parts[0], drafter, batch_size=batch_size)
    rounds = []
    desc = f"benchmark {workload.suite} {workload.serving.chain()}"
    with progress(desc=desc, total=sum(map(len, parts)), unit="prompt") as bar:
        for number, part in enumerate(parts):
            order = (None, subject.drafter) if number % 2 == 0 else (subject.drafter, None)
            runs = {d is None: decode(subject.target, workload, part, d, batch_size=batch_size) for d in order}
            rounds.append(Round(baseline=runs[True], speculative=runs[False]))
            bar.update(len(part))
    return rounds


def deal(requests: Sequence[GenerationRequest], *, num_parts: int, min_size: int) -> list[Sequence[GenerationRequest]]:
    """The requests in order, in parts of nearly one size, at least `min_size`.

    Where there are too few for that, they are gone through again and again, and no part has a request twice.
    """
    count = len(requests)
    if count >= num_parts * min_size:
        return [requests[part * count // num_parts : (part + 1) * count // num_parts] for part in range(num_parts)]
    size = min(count, min_size)
    return [[requests[(part * size + i) % count] for i in range(size)] for part in range(num_parts)]


def decode(
    target: HFTarget,
    workload: Workload,
    requests: Sequence[GenerationRequest],
    drafter: Drafter | None,
    *,
    batch_size: int,
) -> Run:
    """A timed run. The loop waits for the device in every step, so its end is the end of the work."""
    started_at = time.perf_counter()
    generations = generate(
        target,
        requests,
        workload.sampling,
        batch_size=batch_size,
        drafter=drafter,
        num_steps=workload.serving.num_steps,
    )
    by_id = {generation.completion.id: generation for generation in generations}
    return Run(by_id, time.perf_counter() - started_at)


def add_up(generations: Iterable[Generation]) -> Sums:
    """Sums over generations."""
    tokens, steps, accepted = zip(
        *((len(g.completion.token_ids), g.num_verify_steps, g.accepted_by_position) for g in generations), strict=True
    )
    return Sums(sum(tokens), sum(steps), tuple(map(sum, zip(*accepted, strict=True))))


def compare(
    check: LosslessCheck, workload: Workload, baseline: dict[str, Generation], speculative: dict[str, Generation]
) -> Lossless | None:
    """How many prompts have the same answer with draft as without; None for sampled answers."""
    if workload.sampling.temperature > 0.0:
        return None
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
