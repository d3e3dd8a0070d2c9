"""The section `gates` of a manifest entry. Torch-free."""

from typing import Annotated

from pydantic import Field, model_validator

from specforge_core.manifest_errors import cross_field_error
from specforge_core.manifest_sections import Config, Fraction, Name, PositiveInt


class ThresholdConfig(Config):
    """What a draft must reach on one suite, at one load, or on one at the other."""

    suite: Name | None = None
    """All when absent."""
    concurrency: PositiveInt | None = None
    """All when absent."""
    min_acceptance_length: Annotated[float, Field(ge=1.0)] | None = None
    min_speedup: Annotated[float, Field(ge=0.0)] | None = None

    def fits(self, suite: str, concurrency: int) -> bool:
        """Whether a measurement of that suite at that load must reach it."""
        return self.suite in (None, suite) and self.concurrency in (None, concurrency)

    @model_validator(mode="after")
    def _asks_for_something(self) -> "ThresholdConfig":
        if self.min_acceptance_length is None and self.min_speedup is None:
            raise cross_field_error(
                ("min_acceptance_length",), "is missing, and so is min_speedup; a threshold needs one of them"
            )
        return self


class GatesConfig(Config):
    """What a draft must reach, on every suite, before it is published."""

    min_acceptance_length: float = Field(default=1.0, ge=1.0)
    """Tokens per verification step, at every serving configuration."""
    min_speedup: float = Field(default=1.0, ge=0.0)
    """Output tokens per second over the same engine's without draft, at concurrency 1."""
    thresholds: tuple[ThresholdConfig, ...] = ()
    """More of them, for some suites and loads."""
    min_vocabulary_coverage: Fraction = 0.0
    """Share of the supervised tokens that are in the draft vocabulary."""
    lossless: bool = True
    """Greedy outputs with and without draft differ nowhere but at near-ties."""
    max_serving_gap: Fraction = 0.05
    """How far the server's acceptance length may be from that of the same draft in the stage's own process, where
    `benchmark.num_in_process_prompts` asks for it. Few prompts differ by some percent by chance: texts part at
    near-ties."""
    max_baseline_factor: float = Field(default=2.0, gt=1.0)
    """How many times as fast or as slow as usual the target alone may be. Usual is the median of earlier drafts of that
    target with that engine, version, hardware, suite and concurrency; without any, everything is."""
    max_regression: Fraction | None = None
    """Share by which no suite's acceptance length or speedup may fall below the champion's. Only a fall that the 95 %
    intervals show counts; speedups are compared on one engine and hardware. Not asked when absent."""
    min_improvement: Annotated[float, Field(ge=0.0)] | None = None
    """Share by which the mean acceptance length must rise above the champion's, shown by the 95 % interval; 0: must not
    be shown to fall. Not asked when absent."""

    def all_thresholds(self) -> tuple[ThresholdConfig, ...]:
        """The two that every entry has, and those for some suites and loads."""
        return (
            ThresholdConfig(min_acceptance_length=self.min_acceptance_length),
            ThresholdConfig(min_speedup=self.min_speedup, concurrency=1),
            *self.thresholds,
        )

    def relative(self) -> dict[str, float]:
        """The gates that hold a draft against the champion, where they are asked for: by which share it may change."""
        asked = {
            "max_regression": self.max_regression and -self.max_regression,
            "min_improvement": self.min_improvement,
        }
        return {gate: share for gate, share in asked.items() if share is not None}
