"""The one hand-written configuration: `bundle_manifest.yaml`, as frozen pydantic models. Torch-free."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from specforge_core.digests import digest
from specforge_core.manifest_errors import ManifestError, cross_field_error, problems_in, read_document
from specforge_core.manifest_gates import GatesConfig
from specforge_core.manifest_publish import PublishConfig
from specforge_core.manifest_sections import (
    BenchmarkConfig,
    Config,
    DataConfig,
    DraftConfig,
    EngineConfig,
    FeaturesConfig,
    Name,
    ParallelConfig,
    PromptSource,
    ResourcesConfig,
    TargetConfig,
    TrainingConfig,
)
from specforge_core.manifest_yaml import Node, merged

# Acceptance falls off with every step that training did not unroll; the factor is our choice, not a measurement.
MAX_STEPS_PER_TRAINED_STEP = 2


class ManifestEntry(Config):
    """One draft model to build."""

    name: Name
    target: TargetConfig
    engine: EngineConfig = EngineConfig()
    draft: DraftConfig = DraftConfig()
    data: DataConfig
    features: FeaturesConfig = FeaturesConfig()
    training: TrainingConfig = TrainingConfig()
    benchmark: BenchmarkConfig
    gates: GatesConfig = GatesConfig()
    publish: PublishConfig = PublishConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _gates_can_be_passed(self) -> "ManifestEntry":
        gates = self.gates
        shortest = min(serving.num_draft_tokens for serving in self.benchmark.serving)
        if gates.min_acceptance_length > shortest:
            raise cross_field_error(
                ("gates", "min_acceptance_length"),
                f"{gates.min_acceptance_length} can never be reached: a step of the shortest chain in "
                f"benchmark.serving emits at most {shortest} tokens; lower it or lengthen that chain",
            )
        alone = [serving.num_draft_tokens for serving in self.benchmark.serving if serving.concurrency == 1]
        if gates.min_speedup > 0 and not alone:
            raise cross_field_error(
                ("gates", "min_speedup"),
                f"{gates.min_speedup} is required at concurrency 1, where nothing is measured; "
                "add a benchmark.serving with `concurrency: 1` or set min_speedup to 0",
            )
        if alone and gates.min_speedup > min(alone):
            raise cross_field_error(
                ("gates", "min_speedup"),
                f"{gates.min_speedup} can never be reached: a step emits at most {min(alone)} tokens; lower it",
            )
        measured = [(suite.name, serving) for suite in self.benchmark.suites for serving in self.benchmark.serving]
        for i, threshold in enumerate(gates.thresholds):
            if not any(threshold.fits(suite, serving.concurrency) for suite, serving in measured):
                raise cross_field_error(
                    ("gates", "thresholds", i),
                    f"is for nothing that benchmark measures: suite {threshold.suite or 'any'} at concurrency "
                    f"{threshold.concurrency or 'any'}; correct its suite or concurrency",
                )
        return self

    @model_validator(mode="after")
    def _chains_stay_near_what_is_trained(self) -> "ManifestEntry":
        longest = MAX_STEPS_PER_TRAINED_STEP * self.draft.num_steps
        for i, serving in enumerate(self.benchmark.serving):
            if serving.num_steps > longest:
                raise cross_field_error(
                    ("benchmark", "serving", i, "num_steps"),
                    f"{serving.num_steps} is more than {longest}, {MAX_STEPS_PER_TRAINED_STEP} times the "
                    f"draft.num_steps={self.draft.num_steps} that training unrolls; lower it or raise draft.num_steps",
                )
        return self

    @model_validator(mode="after")
    def _engine_can_run(self) -> "ManifestEntry":
        engine, num_gpus = self.engine, self.resources.num_gpus
        if engine.name == "transformers":
            for i, serving in enumerate(self.benchmark.serving):
                if serving.topk > 1:
                    raise cross_field_error(
                        ("benchmark", "serving", i, "topk"),
                        f"{serving.topk} makes trees, which need engine.name: sglang; set it to 1",
                    )
            if self.benchmark.sweep:
                raise cross_field_error(
                    ("benchmark", "sweep"), "needs engine.name: sglang; set it to null to do without"
                )
            return self
        if num_gpus == 0:
            raise cross_field_error(
                ("engine", "name"), "sglang needs a GPU, resources.num_gpus is 0; set `transformers` or raise num_gpus"
            )
        if num_gpus % engine.tensor_parallel:
            raise cross_field_error(
                ("engine", "tensor_parallel"),
                f"{engine.tensor_parallel} does not divide resources.num_gpus={num_gpus}, so GPUs would stay idle; "
                "choose a divisor of it",
            )
        if self.target.dtype == "float32":
            raise cross_field_error(
                ("target", "dtype"),
                "SGLang serves no float32 target; set bfloat16, or engine.name: transformers",
            )
        widest = max(serving.concurrency for serving in self.benchmark.serving)
        if self.benchmark.sweep:
            widest = max(widest, *self.benchmark.sweep.concurrencies)
        if widest > engine.max_running_requests:
            raise cross_field_error(
                ("engine", "max_running_requests"),
                f"{engine.max_running_requests} is less than {widest}, the highest concurrency of benchmark; raise it",
            )
        return self

    @property
    def num_training_gpus(self) -> int:
        """GPUs that train; with live features the others run the target meanwhile. 0 trains on the CPU."""
        return self.resources.num_gpus - (self.features.serve_gpus or 0)

    @model_validator(mode="after")
    def _live_features_are_served(self) -> "ManifestEntry":
        num_gpus, serve_gpus = self.resources.num_gpus, self.features.serve_gpus
        if self.features.mode != "live":
            return self
        if num_gpus == 1:
            raise cross_field_error(
                ("features", "mode"),
                "live needs a GPU that serves and one that trains, resources.num_gpus is 1; set stored or raise it",
            )
        if (serve_gpus is None) != (num_gpus == 0) or (serve_gpus or 0) > max(0, num_gpus - 1):
            allowed, found = f"1 to {num_gpus - 1}" if num_gpus else "left out", serve_gpus or "left out"
            raise cross_field_error(
                ("features", "serve_gpus"),
                f"with resources.num_gpus={num_gpus} it should be {allowed}, not {found}: these GPUs run the target, "
                "the others train",
            )
        if self.engine.name == "transformers" and (serve_gpus or 0) > 1:
            raise cross_field_error(
                ("features", "serve_gpus"), f"{serve_gpus} needs engine.name: sglang; transformers runs on one GPU"
            )
        if self.engine.name == "sglang" and (serve_gpus or 0) % self.engine.tensor_parallel:
            raise cross_field_error(
                ("features", "serve_gpus"),
                f"{serve_gpus} is no multiple of engine.tensor_parallel={self.engine.tensor_parallel}, so GPUs would "
                "stay idle; change one of them",
            )
        return self

    @model_validator(mode="after")
    def _every_gpu_trains(self) -> "ManifestEntry":
        which = "resources.num_gpus" + " - features.serve_gpus" * (self.features.serve_gpus is not None)
        num_gpus, parallel = max(1, self.num_training_gpus), self.training.parallel
        if num_gpus % parallel.gpus_per_replica:
            raise cross_field_error(
                ("training", "parallel"),
                f"cp={parallel.cp} x tp={parallel.tp} does not divide {which}={self.num_training_gpus}; change one "
                "of them",
            )
        if self.draft.num_key_value_heads and self.draft.num_key_value_heads % parallel.tp:
            raise cross_field_error(
                ("training", "parallel", "tp"),
                f"{parallel.tp} does not divide draft.num_key_value_heads={self.draft.num_key_value_heads}; "
                "choose a divisor of it",
            )
        num_micro_batches = self.training.tokens_per_batch // self.training.tokens_per_micro_batch
        if num_micro_batches < num_gpus // parallel.gpus_per_replica:
            way_out = "raise it or lower training.tokens_per_micro_batch"
            raise cross_field_error(
                ("training", "tokens_per_batch"),
                f"{self.training.tokens_per_batch} is {num_micro_batches} micro-batches of "
                f"{self.training.tokens_per_micro_batch} tokens, too few for {which}="
                f"{self.num_training_gpus}{_replicas(parallel)}; {way_out}",
            )
        return self

    @model_validator(mode="after")
    def _suites_are_held_out(self) -> "ManifestEntry":
        for i, suite in enumerate(self.benchmark.suites):
            if any(_overlap(suite.source, source) for source in self.data.sources):
                raise cross_field_error(
                    ("benchmark", "suites", i, "source"),
                    f"the draft is trained on {suite.source.dataset}, split {suite.source.split}; "
                    "measure on a split or a file that is not in data.sources",
                )
        return self

    def digest(self) -> str:
        """A digest of every field, defaults included; the same whatever the order in the file."""
        return digest(self.model_dump(mode="json"))


def _replicas(parallel: ParallelConfig) -> str:
    """How many GPUs share a micro-batch, if they do."""
    shared = parallel.gpus_per_replica
    return f" in replicas of {shared}" if shared > 1 else ""


def _overlap(one: PromptSource, other: PromptSource) -> bool:
    """Whether two sources can hold the same row. A config that is left out can be any."""
    same_config = one.config == other.config or None in (one.config, other.config)
    return (one.dataset, one.split) == (other.dataset, other.split) and same_config


class Manifest(Config):
    """The whole file, after the defaults are merged into every entry."""

    version: Literal[1] = 1
    entries: tuple[ManifestEntry, ...] = Field(min_length=1)
    _base_dir: Path = PrivateAttr()

    @property
    def base_dir(self) -> Path:
        """The manifest's folder, which relative paths in it start at."""
        return self._base_dir

    @staticmethod
    def load(path: Path) -> "Manifest":
        """The manifest of a YAML file, defaults merged into every entry.

        Raises: ManifestError, which lists every error of the file. A check over several fields runs once each of
        them is right by itself.
        """
        document = read_document(path)
        assert document.root is not None
        root, manifest, error = _with_defaults(document.root), None, None
        try:
            # Strict: "3" is no number. As JSON, because there strict mode still takes a list for a tuple.
            manifest = Manifest.model_validate_json(json.dumps(root.plain()), strict=True)
        except ValidationError as validation_error:
            error = validation_error
        problems = problems_in(document, root, error, Manifest)
        if manifest is None or problems:
            raise ManifestError(path, problems)
        manifest._base_dir = path.absolute().parent
        return manifest


def _with_defaults(root: Node) -> Node:
    """The root without `defaults`, which every entry holds instead. Lists replace, sections merge."""
    if not isinstance(root.value, dict):
        return root
    sections = dict(root.value)
    defaults, entries = sections.pop("defaults", None), root.child("entries")
    if defaults and entries and isinstance(entries.value, list):
        whole = [merged(defaults, entry) for entry in entries.value]
        sections["entries"] = replace(entries, value=whole)
    return replace(root, value=sections)
