"""The stages of one entry: what each reads, which of them are done, and why the others are not. Torch-free."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from specforge_core.artifacts import RECORD_NAME, SPEC_NAME, Artifact, Store
from specforge_core.cost.configs import ConfigReader
from specforge_core.draft_limits import check_draft
from specforge_core.engine import engine_on_host, engine_version
from specforge_core.facts import Conversations, DraftCheckpoint, HiddenStates, ServingDraft, Vocabulary
from specforge_core.gpus import Gpu, cpu_name
from specforge_core.ledger import load_entry_record
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_sections import Config
from specforge_core.resolve import resolve_benchmark, resolve_data, resolve_target
from specforge_core.stages import (
    SPECS,
    BenchmarkSpec,
    CaptureSpec,
    ExportSpec,
    LiveSource,
    RegenerateSpec,
    ResolvedBenchmark,
    ResolvedData,
    ResolvedTarget,
    ServedEngine,
    StageSpec,
    TrainSpec,
    UnmeasuredEngine,
    VocabularySpec,
    key_fields,
)


class Recipe(Config):
    """An entry whose target and data are pinned: with the artifacts upstream, all that a stage's spec is made from."""

    entry: ManifestEntry
    engine: ServedEngine
    """The entry's, with what this host adds."""
    target: ResolvedTarget
    data: ResolvedData
    benchmark: ResolvedBenchmark
    hardware: str
    """Name of the processor or GPU that the benchmark runs on."""

    @property
    def device(self) -> str:
        """Where stages that run the target or the draft compute: `cpu` or `cuda`."""
        return "cuda" if self.entry.resources.num_gpus else "cpu"


def make_recipe(
    entry: ManifestEntry, *, base_dir: Path, store: Path, gpus: Sequence[Gpu], environ: Mapping[str, str]
) -> Recipe:
    """The recipe of an entry on this host.

    Args: base_dir: folder that the manifest's relative paths start from; gpus: those of this host; environ: the
    environment, for where SGLang is.
    Raises: ValueError for a target or data that do not exist, or a draft that the target does not allow;
    ConnectionError for a branch on a Hub out of reach.
    """
    num_gpus = entry.resources.num_gpus
    target = resolve_target(entry.target, base_dir, hash_cache=store / "digests")
    # Where no config is to be had, no weights are either: the first stage says so.
    if config := ConfigReader(base_dir).find(target):
        check_draft(entry.draft, config.values)
    return Recipe(
        entry=entry,
        engine=engine_on_host(entry.engine, environ),
        target=target,
        data=resolve_data(entry.data, base_dir),
        benchmark=resolve_benchmark(entry.benchmark, base_dir),
        hardware=f"{num_gpus} x {gpus[0].name}" if num_gpus and gpus else cpu_name(),
    )


def regenerate_spec(recipe: Recipe) -> RegenerateSpec:
    """Prompts answered by the target: the one stage that takes servers which run already."""
    engine = UnmeasuredEngine(**dict(recipe.engine))
    # Those servers have their GPUs already.
    device = "cpu" if engine.name == "sglang" and engine.urls else recipe.device
    return RegenerateSpec(target=recipe.target, engine=engine, data=recipe.data, device=device)


def vocabulary_spec(recipe: Recipe, conversations: Artifact[Conversations]) -> VocabularySpec:
    """The tokens that the draft may propose."""
    return VocabularySpec(
        target=recipe.target,
        conversations=conversations.path,
        draft_vocab_size=recipe.entry.draft.draft_vocab_size,
    )


def capture_spec(recipe: Recipe, conversations: Artifact[Conversations]) -> CaptureSpec:
    """The target's hidden states on those conversations, from servers that load the hook and share a folder.

    Where features are live, only on those that are held out, which every evaluation reads again.
    """
    entry = recipe.entry
    return CaptureSpec(
        target=recipe.target,
        engine=UnmeasuredEngine(**{**dict(recipe.engine), "urls": ()}),
        conversations=conversations.path,
        algorithm=entry.draft.algorithm,
        aux_layers=entry.draft.aux_layers,
        features=entry.features,
        max_document_tokens=entry.training.max_document_tokens,
        held_out_fraction=entry.training.eval_fraction if entry.features.mode == "live" else None,
        device=recipe.device,
    )


def train_spec(
    recipe: Recipe,
    hidden_states: Artifact[HiddenStates],
    vocabulary: Artifact[Vocabulary],
    conversations: Artifact[Conversations],
) -> TrainSpec:
    """A draft trained on those hidden states; with live features on those that the target makes of conversations."""
    features = recipe.entry.features
    is_live = features.mode == "live"
    live = LiveSource(
        engine=UnmeasuredEngine(**{**dict(recipe.engine), "urls": ()}),
        serve_gpus=features.serve_gpus or 0,
        buffer_gib=features.buffer_gib,
    )
    return TrainSpec(
        target=recipe.target,
        hidden_states=hidden_states.path,
        vocabulary=vocabulary.path,
        draft=recipe.entry.draft,
        training=recipe.entry.training,
        device=recipe.device,
        num_processes=max(1, recipe.entry.num_training_gpus),
        live=live if is_live else None,
        conversations=conversations.path if is_live else None,
    )


def export_spec(recipe: Recipe, checkpoint: Artifact[DraftCheckpoint]) -> ExportSpec:
    """The draft in the form that a server loads."""
    return ExportSpec(target=recipe.target, checkpoint=checkpoint.path, num_steps=recipe.entry.draft.num_steps)


def benchmark_spec(
    recipe: Recipe, draft: Artifact[ServingDraft], conversations: Artifact[Conversations]
) -> BenchmarkSpec:
    """Measurements of the served draft, on servers whose arguments match."""
    is_served = recipe.engine.name == "sglang"
    return BenchmarkSpec(
        target=recipe.target,
        engine=ServedEngine(**{**dict(recipe.engine), "urls": ()}),
        engine_version=engine_version(recipe.engine),
        draft=draft.path,
        conversations=None if is_served else conversations.path,
        benchmark=recipe.benchmark,
        hardware=recipe.hardware,
        device=recipe.device,
    )


class Step(NamedTuple):
    """One stage in the chain."""

    make_spec: Callable[..., StageSpec]
    reads: tuple[str, ...]
    """Stages whose artifacts `make_spec` takes after the recipe, in this order."""


STEPS: dict[str, Step] = {
    "regenerate": Step(regenerate_spec, ()),
    "vocabulary": Step(vocabulary_spec, ("regenerate",)),
    "capture": Step(capture_spec, ("regenerate",)),
    "train": Step(train_spec, ("capture", "vocabulary", "regenerate")),
    "export": Step(export_spec, ("train",)),
    "benchmark": Step(benchmark_spec, ("export", "regenerate")),
}


class StagePlan(NamedTuple):
    """What a build would do with one stage."""

    stage: str
    status: Literal["fresh", "stale", "waits"]
    reason: str
    """Why it is not fresh; for a fresh stage the key of its artifact."""


def plan_entry(recipe: Recipe, store: Store) -> list[StagePlan]:
    """What a build of this entry would do now, by stage in the order of the chain. Runs nothing."""
    found: dict[str, Artifact[Any]] = {}
    plans = []
    for stage, step in STEPS.items():
        if missing := [name for name in step.reads if name not in found]:
            plans.append(_waits(stage, missing))
            continue
        spec = step.make_spec(recipe, *(found[name] for name in step.reads))
        key = spec.key()
        if artifact := store.find(stage, key, spec.facts_type):
            found[stage] = artifact
            plans.append(StagePlan(stage, "fresh", key))
        else:
            plans.append(StagePlan(stage, "stale", why_stale(spec, store, entry_name=recipe.entry.name)))
    return plans


def plan_unbuilt() -> list[StagePlan]:
    """What a build of an entry that has no artifact yet would do, whatever its target and data are."""
    return [
        _waits(stage, step.reads) if step.reads else StagePlan(stage, "stale", "never built")
        for stage, step in STEPS.items()
    ]


def _waits(stage: str, missing: Sequence[str]) -> StagePlan:
    return StagePlan(stage, "waits", f"waits for {', '.join(missing)}")


def why_stale(spec: StageSpec, store: Store, *, entry_name: str) -> str:
    """What makes this spec's artifact differ from the newest one of the same entry and stage."""
    stage, key = spec.stage, spec.key()
    if (store.root / stage / key / RECORD_NAME).is_file():
        return "files of its artifact are missing or changed"
    if (store.root / stage / f".building-{key}" / SPEC_NAME).is_file():
        return "an interrupted build goes on from where it was"
    last_key = load_entry_record(store.root, entry_name).keys.get(stage)
    if last_key is None:
        return "never built"
    last = store.root / stage / last_key
    if not (last / RECORD_NAME).is_file():
        return f"its last artifact {last_key} was deleted"
    try:
        last_spec = SPECS[stage].model_validate_json((last / SPEC_NAME).read_text(encoding="utf-8"))
    except ValidationError:
        return "the form of its spec changed with the code"
    changes = list(_changes(last_spec, spec)) + _changed_inputs(last, spec)
    return "; ".join(changes) or f"the stage's code changed: it is version {spec.version} now"


def _changed_inputs(last: Path, spec: StageSpec) -> list[str]:
    last_inputs = json.loads((last / RECORD_NAME).read_text(encoding="utf-8"))["inputs"]
    return [
        f"input {name}: {last_inputs.get(name)} -> {content_id}"
        for name, content_id in spec.inputs().items()
        if last_inputs.get(name) != content_id
    ]


def _changes(last: BaseModel, now: BaseModel) -> Iterator[str]:
    """`field: old -> new` for each key field that differs."""
    old, new = dict(_leaves(key_fields(last))), dict(_leaves(key_fields(now)))
    for name in [*new, *(name for name in old if name not in new)]:
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name)} -> {new.get(name)}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of nested JSON values, with its dotted path."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for name, item in items:
        yield from _leaves(item, f"{path}.{name}" if path else str(name))
