"""What the factory's stages get out of a server, against what it can do: typed results and markdown. Torch-free."""

from collections.abc import Sequence
from statistics import median
from typing import Literal

from pydantic import Field

from specforge_core.benchmark.tables import markdown_table
from specforge_core.facts import Environment, Record, ServerRecord

GIGA = 1e9
REQUIRED_RATIO = 0.9


class Pass(Record):
    """One timed run over the same work."""

    num_requests: int
    num_tokens: int
    """Of prefill and capture those that the server reads, of regeneration those that it writes."""
    elapsed_s: float
    """Until everything is done: of capture until the last shard is hashed and on the disk, of regeneration until the
    conversations are written."""
    served_s: float
    """Of that, until the server has answered the last request."""
    written_bytes: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Over the whole run."""
        return self.num_tokens / self.elapsed_s

    @property
    def served_tokens_per_s(self) -> float:
        """While the server is at work."""
        return self.num_tokens / self.served_s


class Comparison(Record):
    """A stage against its server's own limit on the same work; the passes of the two took turns."""

    stage: Literal["capture", "regenerate"]
    work: str
    """What was read or answered, in words."""
    supervised_share: float | None = None
    """Of the tokens, for those alone capture keeps the last hidden state; None for regeneration."""
    limit: tuple[Pass, ...]
    """A client that sends everything at once, reads the answers and does nothing else."""
    ours: tuple[Pass, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours over the limit, turn by turn, over the whole run."""
        return tuple(ours.tokens_per_s / limit.tokens_per_s for limit, ours in zip(self.limit, self.ours, strict=True))

    @property
    def served_ratios(self) -> tuple[float, ...]:
        """The same, while the server is at work."""
        return tuple(
            ours.served_tokens_per_s / limit.served_tokens_per_s
            for limit, ours in zip(self.limit, self.ours, strict=True)
        )


class ServingRates(Record):
    """All comparisons of one run of the program."""

    environment: Environment
    target: str
    """What was served, in words."""
    note: str | None = None
    """What readers have to know about the target."""
    disk_bytes_per_s: float | None = None
    """What the folder of the shards takes from one thread, until it is safe."""
    servers: dict[str, ServerRecord] = Field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()


def markdown(rates: ServingRates) -> str:
    """The results for people."""
    made_on = rates.environment
    sections = [
        "# What capture and regeneration get out of a server",
        EXPLANATION,
        *([rates.note] if rates.note else []),
        rates_table(rates),
        f"Target: {rates.target}. {made_on.gpu or made_on.cpu}; {made_on.packages}; commit {made_on.commit}; "
        f"`{made_on.command}`." + _disk(rates),
    ]
    if rates.servers:
        commands = [
            f"{name}: SGLang {server.version}\n\n    {server.command}" for name, server in rates.servers.items()
        ]
        sections += ["## Servers", *commands]
    return "\n\n".join(sections) + "\n"


EXPLANATION = f"""\
`limit` is the same server under a client that sends all requests at once and does nothing with the answers: for
capture a server with the same options but without the hooks, which reads the same documents; for regeneration the same
server, which answers the same prompts with as many tokens. `ours` is the pipeline of the stage: capture until the last
shard is hashed and safe on the disk, regeneration with its journal until the conversations are written. The passes
take turns; medians, with the lowest and the highest. `while it serves` leaves out what comes after the server's last
answer, which a longer run has once, too. At least {REQUIRED_RATIO:.0%} is required."""


def rates_table(rates: ServingRates) -> str:
    """One row for each comparison."""
    return markdown_table([_cells(comparison) for comparison in rates.comparisons])


def _cells(comparison: Comparison) -> dict[str, str]:
    ours, limit = comparison.ours, comparison.limit
    written = [one.written_bytes / one.elapsed_s / GIGA for one in ours]
    share = comparison.supervised_share
    return {
        "stage": comparison.stage,
        "work of a pass": f"{comparison.work}; {ours[0].num_requests:,} requests, {ours[0].num_tokens:,} tokens",
        "supervised": "-" if share is None else f"{share:.0%}",
        "limit, tokens/s": _spread([one.tokens_per_s for one in limit], "{:,.0f}"),
        "ours, tokens/s": _spread([one.tokens_per_s for one in ours], "{:,.0f}"),
        "ratio": _spread(comparison.ratios, "{:.1%}"),
        "ratio while it serves": _spread(comparison.served_ratios, "{:.1%}"),
        "written, GB/s": _spread(written, "{:.2f}") if any(written) else "-",
    }


def _spread(values: Sequence[float], form: str) -> str:
    """Median, lowest and highest."""
    middle, low, high = (form.format(value) for value in (median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def _disk(rates: ServingRates) -> str:
    if rates.disk_bytes_per_s is None:
        return ""
    return f" The disk takes {rates.disk_bytes_per_s / GIGA:.2f} GB/s from one thread, synced."
