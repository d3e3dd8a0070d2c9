"""Public results that drafts are compared with: `anchors.json`, each row with its source and conditions. Torch-free.

Only of EAGLE-3, and only where the source says suite, requests at once, and chain or tree: nothing of ours can stand
beside other figures.
"""

from importlib import resources
from typing import NamedTuple

from specforge_core.facts import Measurement, Record
from specforge_core.manifest_sections import ServingConfig

DATA_NAME = "anchors.json"


class AnchorSource(Record):
    """Who published figures, where, and how they were measured."""

    name: str
    url: str
    engine: str
    conditions: str
    """What the source states of hardware and sampling, and what it does not."""


class AnchorRow(Record):
    """One public draft at one serving configuration. Figures by suite; a source may lack some."""

    source: str
    """Key in `Anchors.sources`."""
    target: str
    """Hub id."""
    draft: str
    batch: int
    """Requests at once."""
    chain: tuple[int, int, int] | None
    """Steps, top-k and draft tokens; None for the paper's dynamic trees, which no chain may be compared with."""
    acceptance_length: dict[str, float]
    speedup: dict[str, float]


class Anchors(Record):
    """The whole file."""

    sources: dict[str, AnchorSource]
    rows: tuple[AnchorRow, ...]


class Anchor(NamedTuple):
    """One public figure."""

    source: AnchorSource
    target: str
    draft: str
    batch: int
    chain: tuple[int, int, int] | None
    suite: str
    acceptance_length: float | None
    speedup: float | None

    def shape(self) -> str:
        """The chain as `ServingConfig.chain` writes it, or that it was a tree."""
        return "tree" if self.chain is None else "-".join(map(str, self.chain))

    def is_comparable(self, serving: ServingConfig) -> bool:
        """Whether it was measured with the same chain and as many requests at once."""
        chain = (serving.num_steps, serving.topk, serving.num_draft_tokens)
        return self.chain == chain and self.batch == serving.concurrency


def load_anchors() -> tuple[Anchor, ...]:
    """Every figure that ships with the package."""
    text = resources.files("specforge_core.site").joinpath(DATA_NAME).read_text(encoding="utf-8")
    anchors = Anchors.model_validate_json(text)
    return tuple(
        Anchor(
            anchors.sources[row.source],
            row.target,
            row.draft,
            row.batch,
            row.chain,
            suite,
            row.acceptance_length.get(suite),
            row.speedup.get(suite),
        )
        for row in anchors.rows
        for suite in dict.fromkeys([*row.acceptance_length, *row.speedup])
    )


def comparable(anchors: tuple[Anchor, ...], target: str, measurement: Measurement) -> tuple[Anchor, ...]:
    """The figures of this target and suite, at the measurement's serving configuration."""
    return tuple(
        anchor
        for anchor in anchors
        if (anchor.target, anchor.suite) == (target, measurement.suite) and anchor.is_comparable(measurement.serving)
    )
