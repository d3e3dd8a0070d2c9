"""The stages of the factory: what each one reads and returns. Torch-free.

A stage is `python -m specforge_core STAGE --spec spec.json --out DIR`. Its spec names everything it reads; its key is a
digest of that, so two specs with one key give one artifact. Marks on a field say what the digest takes: INPUT, the
content id of the artifact in that directory; EXECUTION, nothing (it says where and how fast, not what); OPTIONAL,
nothing while it is None, so that a field which came later leaves the keys of those who do not use it as they are.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel

from specforge_core.artifacts import content_id_of, digest
from specforge_core.facts import (
    BenchmarkResult,
    Conversations,
    DraftCheckpoint,
    HiddenStates,
    Record,
    ServingDraft,
    Vocabulary,
)
from specforge_core.manifest_sections import (
    EXECUTION,
    BenchmarkConfig,
    Config,
    DataConfig,
    DraftConfig,
    EngineConfig,
    FeaturesConfig,
    PromptSource,
    SuiteConfig,
    TargetConfig,
    TrainingConfig,
)

# Exit status of a stage whose spec cannot work (argparse's too): a second try fails like the first.
USER_ERROR_STATUS = 2

INPUT = "input"
OPTIONAL = "optional"
InputDirectory = Annotated[Path, INPUT]


class ResolvedTarget(TargetConfig):
    """A target whose content is pinned."""

    model: Annotated[str, EXECUTION]
    """Hub id, or absolute path."""
    revision: Annotated[str | None, EXECUTION] = None
    """Commit of a Hub model."""
    content_id: str
    """The commit, or the digest of a local folder's files."""


class ResolvedSource(PromptSource):
    """A prompt source whose content is pinned."""

    dataset: Annotated[str, EXECUTION]
    """Hub id, absolute path, or `builtin:demo`."""
    revision: Annotated[str | None, EXECUTION] = None
    content_id: str


class ResolvedData(DataConfig):
    sources: tuple[ResolvedSource, ...]


class ResolvedSuite(SuiteConfig):
    source: ResolvedSource


class ResolvedBenchmark(BenchmarkConfig):
    suites: tuple[ResolvedSuite, ...]


class ServedEngine(EngineConfig):
    """An engine, and where its servers come from."""

    python: Annotated[str, EXECUTION] = sys.executable
    """Interpreter of the environment that has SGLang."""
    urls: Annotated[tuple[str, ...], EXECUTION] = ()
    """Servers that run already; none: the stage starts its own."""


class UnmeasuredEngine(ServedEngine):
    """The same for stages whose result is not a speed: how many requests run at once, and on how many GPUs, is no part
    of it."""

    tensor_parallel: Annotated[int, EXECUTION] = 1
    max_running_requests: Annotated[int, EXECUTION] = 64
    mem_fraction_static: Annotated[float, EXECUTION] = 0.85
    colocate: Annotated[bool, EXECUTION] = True


class StageSpec(Config):
    """Base of the specs. Every field without a mark is part of the key."""

    stage: ClassVar[str]
    version: ClassVar[int]
    """Raise it when the stage's code gives another result for the same spec."""
    facts_type: ClassVar[type[Record]]

    device: Annotated[str, EXECUTION] = "cpu"
    """`cpu` or `cuda`; which GPU is the environment's to say."""

    def inputs(self) -> dict[str, str]:
        """Content id by input name. Raises: FileNotFoundError if an input is not a whole artifact."""
        marked = [name for name, field in type(self).model_fields.items() if INPUT in field.metadata]
        return {name: content_id_of(path) for name in marked if (path := getattr(self, name)) is not None}

    def key(self) -> str:
        """The digest of everything that the stage reads."""
        return digest(
            {"stage": self.stage, "version": self.version, "config": key_fields(self), "inputs": self.inputs()}
        )


def key_fields(model: BaseModel) -> dict[str, Any]:
    """The unmarked fields of a spec, nested models included, as JSON values."""

    def value_of(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return key_fields(value)
        if isinstance(value, tuple):
            return [value_of(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {
        name: value_of(getattr(model, name))
        for name, field in type(model).model_fields.items()
        if INPUT not in field.metadata
        and EXECUTION not in field.metadata
        and not (OPTIONAL in field.metadata and getattr(model, name) is None)
    }


class RegenerateSpec(StageSpec):
    """Prompts in, conversations answered by the target out."""

    stage: ClassVar[str] = "regenerate"
    version: ClassVar[int] = 1
    facts_type: ClassVar[type[Record]] = Conversations

    target: ResolvedTarget
    engine: UnmeasuredEngine = UnmeasuredEngine(name="transformers")
    data: ResolvedData
    batch_size: Annotated[int, EXECUTION] = 64
    """Of answers at once in process; a server takes `engine.max_running_requests`."""


class VocabularySpec(StageSpec):
    """Conversations in, the draft's vocabulary out."""

    stage: ClassVar[str] = "vocabulary"
    version: ClassVar[int] = 1
    facts_type: ClassVar[type[Record]] = Vocabulary

    target: ResolvedTarget
    conversations: InputDirectory
    draft_vocab_size: int


class CaptureSpec(StageSpec):
    """Conversations in, hidden states of the target out."""

    stage: ClassVar[str] = "capture"
    version: ClassVar[int] = 2
    facts_type: ClassVar[type[Record]] = HiddenStates

    target: ResolvedTarget
    engine: UnmeasuredEngine = UnmeasuredEngine(name="transformers")
    conversations: InputDirectory
    algorithm: str
    """Draft algorithm, which knows the layers that it reads."""
    aux_layers: tuple[int, ...] | None
    features: FeaturesConfig
    max_document_tokens: int
    held_out_fraction: Annotated[float | None, OPTIONAL] = None
    """Only the documents that are held out of training (`data.loader.is_held_out`); None: all."""
    batch_tokens: Annotated[int, EXECUTION] = 8192


class LiveSource(Config):
    """What makes a training's features while it runs. Their layers and dtype are those of the stored ones."""

    engine: UnmeasuredEngine
    serve_gpus: Annotated[int, EXECUTION] = 0
    """The last ones of those that the stage sees; the processes that train have the others."""
    buffer_gib: Annotated[float, EXECUTION] = 8.0
    """How much may wait for the training."""
    batch_tokens: Annotated[int, EXECUTION] = 8192
    """Of a forward of the target."""


class TrainSpec(StageSpec):
    """Hidden states in, a draft checkpoint out. With `live` only the held-out ones need be stored.

    Live features differ from stored ones by the target's rounding, so the two trainings have keys of their own.
    """

    stage: ClassVar[str] = "train"
    version: ClassVar[int] = 3
    facts_type: ClassVar[type[Record]] = DraftCheckpoint

    target: ResolvedTarget
    hidden_states: InputDirectory
    vocabulary: InputDirectory
    draft: DraftConfig
    training: TrainingConfig
    num_processes: Annotated[int, EXECUTION] = 1
    """On each node."""
    live: Annotated[LiveSource | None, OPTIONAL] = None
    conversations: Annotated[Path | None, INPUT] = None
    """What the target reads; None unless features are live."""


class ExportSpec(StageSpec):
    """A draft checkpoint in, the folders that servers load out."""

    stage: ClassVar[str] = "export"
    version: ClassVar[int] = 2
    facts_type: ClassVar[type[Record]] = ServingDraft

    target: ResolvedTarget
    checkpoint: InputDirectory
    num_steps: int
    """Of training-time test: how much a vLLM server drafts at once unless it is told."""


class BenchmarkSpec(StageSpec):
    """A served draft in, measurements out."""

    stage: ClassVar[str] = "benchmark"
    version: ClassVar[int] = 2
    facts_type: ClassVar[type[Record]] = BenchmarkResult

    target: ResolvedTarget
    engine: ServedEngine = ServedEngine(name="transformers")
    engine_version: Annotated[str | None, OPTIONAL] = None
    """With the engine's name; None where nobody asked. As with hardware, a number measured on one says nothing about
    another, so that a new version has every draft measured again."""
    draft: InputDirectory
    conversations: Annotated[Path | None, INPUT] = None
    """The n-gram drafter learns from these; None for a server, which has no such drafter."""
    benchmark: ResolvedBenchmark
    hardware: str
    """Name of the processor or GPU."""


SPECS: dict[str, type[StageSpec]] = {
    spec.stage: spec for spec in (RegenerateSpec, VocabularySpec, CaptureSpec, TrainSpec, ExportSpec, BenchmarkSpec)
}
