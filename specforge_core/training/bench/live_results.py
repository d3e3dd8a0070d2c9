"""What training on live features reaches against its two sides alone: a typed result and markdown. Torch-free."""

from collections.abc import Sequence

from specforge_core.benchmark.tables import markdown_table
from specforge_core.facts import Environment, Record, ServerRecord

REQUIRED_RATIO = 0.9


class Interval(Record):
    """A stretch of time in steady state."""

    num_tokens: int
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed_s


class Rate(Record):
    """One side at work; intervals follow each other."""

    intervals: tuple[Interval, ...]

    @property
    def tokens_per_s(self) -> float:
        """Over all of them."""
        num_tokens = sum(interval.num_tokens for interval in self.intervals)
        return num_tokens / sum(interval.elapsed_s for interval in self.intervals)

    @property
    def by_interval(self) -> list[float]:
        """Tokens/s of each."""
        return [interval.tokens_per_s for interval in self.intervals]


class LiveRate(Record):
    """Both sides together, over the same time."""

    produced: Rate
    consumed: Rate
    producer_wait_share: float
    """Of the time that the producer waits for room."""
    trainer_wait_share: float
    """Of the time that the trainers wait for features."""

    @property
    def sustained(self) -> Rate:
        """The slower side: what the other one has more comes from the buffer, or goes there, and neither lasts."""
        return min(self.produced, self.consumed, key=lambda rate: rate.tokens_per_s)


class Setup(Record):
    """What all three had in common."""

    target: str
    """In words."""
    note: str | None = None
    """What readers have to know about the target."""
    documents: str
    """In words."""
    supervised_share: float
    """Of their tokens."""
    features_dtype: str
    num_steps: int
    """Of training-time test, S."""
    tokens_per_micro_batch: int
    tokens_per_batch: int
    """Of all replicas together."""
    buffer_gib: float
    serve_gpus: int
    """0 and 0: all on the CPU."""
    train_gpus: int
    tensor_parallel: int
    """Of each server."""
    cp: int
    """Of the training; the rest is dp."""


class LiveBench(Record):
    """A run."""

    environment: Environment
    setup: Setup
    server: ServerRecord | None = None
    """The first one, as it served alone."""
    serve_alone: Rate | None = None
    train_alone: Rate | None = None
    live: LiveRate | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """Live against the slower of the two alone: over all, then by interval."""
        if not (self.serve_alone and self.train_alone and self.live):
            return ()
        limit = min(self.serve_alone.tokens_per_s, self.train_alone.tokens_per_s)
        sustained = self.live.sustained
        return tuple(rate / limit for rate in (sustained.tokens_per_s, *sustained.by_interval))


def markdown(result: LiveBench) -> str:
    """The result for people."""
    made_on, setup = result.environment, result.setup
    sections = [
        f"# Training on live features, {made_on.gpu or made_on.cpu}",
        EXPLANATION,
        *([setup.note] if setup.note else []),
        live_table(result),
        f"Target: {setup.target}. {setup.documents}, {setup.supervised_share:.0%} of the tokens supervised, features "
        f"in {setup.features_dtype}. S = {setup.num_steps}, {setup.tokens_per_micro_batch:,} tokens a micro-batch, "
        f"{setup.tokens_per_batch:,} a step, a buffer of {setup.buffer_gib:g} GiB. {made_on.packages}; commit "
        f"{made_on.commit}; `{made_on.command}`.",
    ]
    if result.server:
        sections += ["## Server", f"SGLang {result.server.version}\n\n    {result.server.command}"]
    return "\n\n".join(sections) + "\n"


EXPLANATION = f"""\
Serving alone: the producer of live features fills a spool that is emptied at once. Training alone: the stage `train`
on the same features, in memory. Live: the stage `train` with its producer beside it, on the same documents. All are
the processes of a build, one after the other on the same GPUs; tokens/s of all GPUs of a side together, in steady
state, over all intervals, with the slowest and the fastest one. The ratio is that of the slower side of live to the
slower one of the two alone. At least {REQUIRED_RATIO:.0%} is required."""


def live_table(result: LiveBench) -> str:
    """One row for each rate, and the ratio."""
    setup, live = result.setup, result.live
    serving = _gpus(setup.serve_gpus, f"serve, tensor parallel {setup.tensor_parallel}")
    cp = max(1, setup.cp)
    training = _gpus(setup.train_gpus, f"train, dp {max(1, setup.train_gpus) // cp} x cp {cp}")
    rows: list[tuple[str, str, Rate | None, float | None]] = [
        ("serving alone", serving, result.serve_alone, None),
        ("training alone", training, result.train_alone, None),
    ]
    if live:
        rows.append(("live, made", serving, live.produced, live.producer_wait_share))
        rows.append(("live, trained on", training, live.consumed, live.trainer_wait_share))
    cells = [
        {
            "": name,
            "GPUs": gpus,
            "tokens/s": _spread(rate.tokens_per_s, rate.by_interval, "{:,.0f}"),
            "waits for the other": "-" if wait_share is None else f"{wait_share:.1%}",
            "measured, s": f"{sum(interval.elapsed_s for interval in rate.intervals):.0f}",
        }
        for name, gpus, rate, wait_share in rows
        if rate
    ]
    if result.ratios:
        ratio = _spread(result.ratios[0], result.ratios[1:], "{:.1%}")
        cells.append({"": "**live / slower alone**", "GPUs": "", "tokens/s": f"**{ratio}**"})
        cells[-1] |= {"waits for the other": "", "measured, s": ""}
    return markdown_table(cells)


def _gpus(count: int, work: str) -> str:
    return f"{count} {work}" if count else "CPU"


def _spread(overall: float, parts: Sequence[float], form: str) -> str:
    low, high = form.format(min(parts)), form.format(max(parts))
    return f"{form.format(overall)} ({low} to {high})"
