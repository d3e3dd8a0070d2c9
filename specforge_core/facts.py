"""What stages find out, as typed records: the facts of each artifact, and what becomes of a draft. Torch-free."""

from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field, model_validator

from specforge_core.benchmark.interval import Interval, ratio_interval
from specforge_core.manifest_sections import ServingConfig


class Record(BaseModel):
    """Base of everything that is written to a record file: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Conversations(Record):
    """Facts about regenerated conversations. Token counts are in target tokens."""

    num_conversations: int
    num_tokens: int
    num_loss_tokens: int
    """Tokens that the target produced."""
    num_failed: int
    """Prompts that gave no usable conversation."""
    num_cut_off: int
    """Conversations whose last answer reached the limit of new tokens."""
    chat_template_sha256: str


class Vocabulary(Record):
    """Facts about a draft vocabulary."""

    draft_vocab_size: int
    target_vocab_size: int
    coverage: float
    """Share of the supervised tokens that are in the draft vocabulary."""


class HiddenStates(Record):
    """Facts about captured features."""

    layers: tuple[int, ...]
    """Decoder layers whose output was captured, counted from 0, in the order stored."""
    num_target_layers: int
    hidden_size: int
    dtype: str
    num_documents: int
    num_tokens: int
    num_loss_tokens: int
    num_shards: int


class DraftCheckpoint(Record):
    """Facts about a trained draft. Positions are draft positions, the first one first."""

    algorithm: str
    step: int
    tokens_seen: int
    num_parameters: int
    eval_loss: float
    eval_accuracy: tuple[float, ...]
    """Greedy matches with the target, by position."""
    eval_acceptance: tuple[float, ...]
    """Expected acceptance probability, by position."""
    eval_acceptance_length: float
    """Tokens per verification step of a speculative loop over held-out conversations."""


class ServingDraft(Record):
    """Facts about an exported draft."""

    architecture: str
    num_parameters: int
    max_reload_error: float
    """Largest difference of logits between the trained and the re-loaded draft, in any format; must be 0."""


class Environment(Record):
    """What a measurement ran on."""

    cpu: str
    num_threads: int
    gpu: str | None
    versions: dict[str, str]
    commit: str | None
    command: str

    @property
    def packages(self) -> str:
        """Their versions in a line."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())


class Lossless(Record):
    """Outputs with draft against outputs without, by prompt."""

    num_identical: int
    num_near_tie: int
    """First difference at two tokens whose float32 logits are closer than rounding."""
    num_different: int


class Answers(Record):
    """Final answers against the suite's references, of prompts that have one."""

    num_checked: int
    num_correct: int
    num_correct_without_draft: int


class ServerRecord(Record):
    """What served a stage."""

    version: str
    """Of SGLang."""
    command: str | None = None
    """Its latest start; None for a server that was running already."""
    gpus: tuple[str, ...] = ()
    dropped_flags: tuple[str, ...] = ()
    """Options that this version does not have."""
    num_restarts: int = 0


class PromptSums(Record):
    """What a draft did on each prompt of a suite, so that two drafts can be compared prompt by prompt."""

    ids_digest: str
    """Of the prompts' ids in their order, which the two below have too."""
    num_output_tokens: tuple[int, ...]
    num_verify_steps: tuple[int, ...]


class Measurement(Record):
    """One suite at one serving configuration. Sums, and what follows from them."""

    suite: str
    serving: ServingConfig
    num_prompts: int
    num_output_tokens: int
    num_verify_steps: int
    accepted_by_position: tuple[int, ...]
    """Verification steps in which the draft token at this position was accepted."""
    prompts: PromptSums | None = None
    """The same by prompt; None in records from before it was kept."""
    ngram_acceptance_length: float | None = None
    """The same engine with an n-gram drafter, so that predictable text is not oversold. Not of a server."""
    in_process_acceptance_length: float | None = None
    """Of the same draft and chain in this project's own loop, where a server was measured and that was asked for."""
    served_on_same_prompts: float | None = None
    """The server's acceptance length on the prompts of that comparison, the first ones of the suite."""
    baseline_output_tokens_per_s: tuple[float, ...]
    """Without draft, one value per repeat."""
    output_tokens_per_s: tuple[float, ...]
    """With draft, one value per repeat, interleaved with the above."""
    speedup: float
    speedup_low: float
    speedup_high: float
    """Median of the repeats' ratios, and its 95 % interval."""
    lossless: Lossless | None
    """None for a sampled run: there the distribution is equal, not the text."""
    answers: Answers | None = None
    """None for a suite whose answers are not checked."""

    @model_validator(mode="before")
    @classmethod
    def _drop_derived(cls, values: Any) -> Any:
        # Files carry them for their readers; here they follow from the sums.
        derived = {"acceptance_length", "acceptance_length_low", "acceptance_length_high"}
        return {k: v for k, v in values.items() if k not in derived} if isinstance(values, dict) else values

    @computed_field  # type: ignore[prop-decorator]
    @property
    def acceptance_length(self) -> float:
        """Tokens per verification step, the target's own token included; SGLang's `spec_accept_length`."""
        return self.num_output_tokens / self.num_verify_steps

    @computed_field  # type: ignore[prop-decorator]
    @property
    def acceptance_length_low(self) -> float | None:
        """Lower end of its 95 % interval over prompts; None without the sums of at least two."""
        return self._interval and self._interval.low

    @computed_field  # type: ignore[prop-decorator]
    @property
    def acceptance_length_high(self) -> float | None:
        """Upper end."""
        return self._interval and self._interval.high

    @property
    def _interval(self) -> Interval | None:
        if self.prompts is None or len(self.prompts.num_output_tokens) < 2:
            return None
        return ratio_interval([self.prompts.num_output_tokens], [self.prompts.num_verify_steps])

    @property
    def speedup_interval(self) -> Interval:
        """The speedup with its 95 % interval."""
        return Interval(self.speedup, self.speedup_low, self.speedup_high)

    @property
    def serving_gap(self) -> float | None:
        """How far what the server accepts is from what the reference does, as a share of the latter; None where there
        is no reference."""
        if self.in_process_acceptance_length is None or self.served_on_same_prompts is None:
            return None
        return self.served_on_same_prompts / self.in_process_acceptance_length - 1


class SweepPoint(Record):
    """One chain at one concurrency, on the prompts of all suites; sums over its requests."""

    serving: ServingConfig
    num_requests: int
    num_output_tokens: int
    num_verify_steps: int
    baseline_output_tokens_per_s: tuple[float, ...]
    """Without draft at the same concurrency, one value per repeat."""
    output_tokens_per_s: tuple[float, ...]

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification step."""
        return self.num_output_tokens / self.num_verify_steps

    @property
    def speedup(self) -> float:
        """Of the medians."""
        return median(self.output_tokens_per_s) / median(self.baseline_output_tokens_per_s)


class BenchmarkResult(Record):
    """What a draft was measured to do."""

    measurements: tuple[Measurement, ...]
    environment: Environment
    engine: str = "transformers"
    """As `engine.name` of the manifest."""
    sweep: tuple[SweepPoint, ...] = ()
    servers: dict[str, ServerRecord] = {}
    """By what they served: `baseline`, or the chain of the draft."""


class GateFailure(Record):
    """One threshold of the manifest that a draft did not reach."""

    gate: str
    """Field of `gates` in the manifest, or `speedup_is_possible`, which every measurement must pass."""
    suite: str | None
    """None if the gate is about the draft as a whole."""
    measured: float | None
    """None if nothing measured it."""
    required: float
    message: str
    """Both values, where they were measured, and what to try."""


class Published(Record):
    """A draft that passed its gates, and where it lies."""

    path: Path
    content_id: str
    """Digest of the repository's files."""
    changed: bool
    """False if exactly these files were there already."""
    repository: str | None = None
    """Hub id; None if it lies only in the folder, as do the two below."""
    revision: str | None = None
    """Commit of the repository that holds just what the folder does."""
    url: str | None = None


class Rejected(Record):
    """A draft that did not pass its gates."""

    failures: tuple[GateFailure, ...]


class Withheld(Record):
    """A draft that passed its gates in a build that publishes nothing."""

    plan: Path | None = None
    """What publishing it would change, if that was asked."""
