"""A draft beside the champion of its entry: by how much each figure changed, and how sure that is. Torch-free.

Acceptance lengths are compared prompt by prompt, which leaves out how much prompts differ among each other. They do not
depend on the hardware; speedups are compared where both drafts were measured by one engine on one kind of hardware.
"""

from collections.abc import Mapping
from statistics import median
from types import MappingProxyType
from typing import Literal, NamedTuple

from specforge_core.benchmark.interval import Interval, product_interval, ratio_interval
from specforge_core.facts import BenchmarkResult, Measurement, Record
from specforge_core.manifest_sections import EngineConfig, ServingConfig

Metric = Literal["acceptance length", "speedup"]


class Change(Record):
    """One figure of a draft beside the champion's."""

    metric: Metric
    suite: str
    serving: ServingConfig
    champion: float
    measured: float
    low: float
    high: float
    """95 % interval of `measured / champion`."""

    @property
    def ratio(self) -> Interval:
        """`measured / champion`."""
        return Interval(self.measured / self.champion, self.low, self.high)


class Comparison(Record):
    """A draft against the champion."""

    version: int
    """The champion's, in the registry."""
    changes: tuple[Change, ...]
    not_compared: tuple[str, ...] = ()
    """One sentence each."""

    def of(self, metric: Metric) -> list[Change]:
        """The changes of one kind of figure."""
        return [change for change in self.changes if change.metric == metric]

    def mean_acceptance(self) -> Interval | None:
        """By which factor the acceptance length changed: the geometric mean over the suites, at the first serving
        configuration that was compared. None if none was."""
        changes = self.of("acceptance length")
        ratios = [change.ratio for change in changes if change.serving == changes[0].serving]
        return product_interval(ratios, power=1 / len(ratios)) if ratios else None


def where(figure: Measurement | Change) -> str:
    """The suite and the serving configuration of a figure, for a sentence."""
    return f"on {figure.suite} with {figure.serving.chain()} at concurrency {figure.serving.concurrency}"


def in_percent(ratio: Interval) -> str:
    """A change as text: `-8.1% (-9.6% to -6.5%)`, the interval in brackets."""
    value, low, high = (f"{limit - 1:+.1%}" for limit in ratio)
    return f"{value} ({low} to {high})"


class Standing(NamedTuple):
    """What the registry says about a new draft's place among those before it."""

    comparison: Comparison | None = None
    """None: the entry has no champion, or this draft is the champion."""
    usual_speeds: Mapping[str, float] = MappingProxyType({})
    """As `baseline_speeds`: medians over earlier drafts that were measured in the same setting."""
    setting: str = ""
    rolled_back: int | None = None
    """The draft's version, if the entry was rolled back from it."""
    unknown: str | None = None
    """Why the registry could not be asked."""


class Setting(NamedTuple):
    """What speeds depend on beside draft, load and suite."""

    engine: str
    version: str
    """Of the engine."""
    hardware: str

    def __str__(self) -> str:
        return f"{self.engine} {self.version} on {self.hardware}"


class Measured(NamedTuple):
    """A result, and how its engine was set."""

    result: BenchmarkResult
    engine: EngineConfig

    def setting(self) -> Setting:
        """Where its speeds hold."""
        made_on = self.result.environment
        versions = {server.version for server in self.result.servers.values()}
        version = ", ".join(sorted(versions)) or made_on.versions.get(self.result.engine, "unknown")
        gpus = f"{self.engine.tensor_parallel} x {made_on.gpu}"
        return Setting(self.result.engine, version, gpus if made_on.gpu else made_on.cpu)


def baseline_speeds(result: BenchmarkResult) -> dict[str, float]:
    """Output tokens/s of the target alone, by suite and concurrency; medians over the repeats."""
    speeds: dict[str, list[float]] = {}
    for measurement in result.measurements:
        speeds.setdefault(baseline_name(measurement), []).extend(measurement.baseline_output_tokens_per_s)
    return {name: median(values) for name, values in speeds.items()}


def baseline_name(measurement: Measurement) -> str:
    """What a speed without draft is known by."""
    return f"{measurement.suite}-c{measurement.serving.concurrency}"


def compare(new: Measured, champion: Measured, *, version: int) -> Comparison:
    """Each figure of a result that the champion's has too, beside it."""
    (engine, _, hardware), (engine_before, _, hardware_before) = new.setting(), champion.setting()
    is_same_setting = (engine, hardware) == (engine_before, hardware_before)
    changes: list[Change] = []
    reasons: list[str] = []
    if not is_same_setting:
        reasons.append(f"speedups: those of version {version} are of {engine_before} on {hardware_before}")
    before = {(m.suite, m.serving): m for m in champion.result.measurements}
    for measurement in new.result.measurements:
        other = before.pop((measurement.suite, measurement.serving), None)
        if other is None:
            reasons.append(f"{where(measurement)}: version {version} was not measured there")
            continue
        if ratio := _acceptance_ratio(measurement, other):
            champion_length, length = other.acceptance_length, measurement.acceptance_length
            changes.append(_change("acceptance length", measurement, champion_length, length, ratio))
        else:
            reasons.append(f"acceptance length {where(measurement)}: it shares no two prompts with version {version}")
        if is_same_setting:
            ratio = _speedup_ratio(measurement, other)
            changes.append(_change("speedup", measurement, other.speedup, measurement.speedup, ratio))
    reasons += [f"{where(measurement)}: measured of version {version} alone" for measurement in before.values()]
    return Comparison(version=version, changes=tuple(changes), not_compared=tuple(reasons))


def _change(metric: Metric, at: Measurement, champion: float, measured: float, ratio: Interval) -> Change:
    """Args: at: where both were measured; ratio: `measured / champion`, with its interval."""
    return Change(
        metric=metric,
        suite=at.suite,
        serving=at.serving,
        champion=champion,
        measured=measured,
        low=ratio.low,
        high=ratio.high,
    )


def _acceptance_ratio(new: Measurement, before: Measurement) -> Interval | None:
    """None unless both are of the same prompts, at least two."""
    ours, theirs = new.prompts, before.prompts
    if ours is None or theirs is None or ours.ids_digest != theirs.ids_digest or new.num_prompts < 2:
        return None
    return ratio_interval(
        numerators=[ours.num_output_tokens, theirs.num_verify_steps],
        denominators=[ours.num_verify_steps, theirs.num_output_tokens],
    )


def _speedup_ratio(new: Measurement, before: Measurement) -> Interval:
    # Measured apart from each other, so their intervals add up.
    inverse = Interval(1 / before.speedup, 1 / before.speedup_high, 1 / before.speedup_low)
    return product_interval([new.speedup_interval, inverse])
