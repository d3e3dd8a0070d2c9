"""Measures what float8 features and float8 products do to the acceptance length of drafts, and writes a report.

    python -m specforge_core.training.bench.float8_study                       the demo target, features alone; on a CPU
    python -m specforge_core.training.bench.float8_study --device cuda --targets demo large
    python -m specforge_core.training.bench.float8_study --merge elsewhere/float8.json

`large` is a target of 120 M parameters, trained on the spot, because a target from the Hub can not always be had.
Every draft that is done is in the report at once. With --work, a run that was cut off goes on where it stopped.
"""

import argparse
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from specforge_core.artifacts import Artifact, Store, seal, write_atomically
from specforge_core.data import regenerate, vocab
from specforge_core.data.loader import FeatureSet
from specforge_core.data.shards import load_index
from specforge_core.demo.target_data import build_corpus, load_tokenizer
from specforge_core.demo.train_target import Plan, Size, new_model
from specforge_core.demo.train_target import train as train_target
from specforge_core.facts import Conversations
from specforge_core.manifest import Manifest, ManifestEntry
from specforge_core.manifest_sections import FeatureDtype, TargetConfig
from specforge_core.resolve import resolve_data, resolve_target
from specforge_core.stages import CaptureSpec, RegenerateSpec, ResolvedTarget, StageSpec, TrainSpec, VocabularySpec
from specforge_core.targets import capture
from specforge_core.training import train
from specforge_core.training.bench.float8_results import (
    NAME,
    Outcome,
    StudiedTarget,
    StudyRun,
    load_study,
    write_study,
)
from specforge_core.training.bench.measure import measured_environment
from specforge_core.training.evaluate import Evaluation, evaluate
from specforge_core.training.workers import join_workers

logger = logging.getLogger(__name__)

MAINS: dict[str, Callable[[Any, Path], Any]] = {
    "regenerate": regenerate.main,
    "vocabulary": vocab.main,
    "capture": capture.main,
    "train": train.main,
}
DEMO_ENTRY = "demo"
LARGE = Size(width=1024, num_layers=10, intermediate_size=2816, num_heads=16, num_kv_heads=8)
TINY = Size(width=64, num_layers=8, intermediate_size=128, num_heads=2, num_kv_heads=1)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ORIGIN_NAME = "origin.txt"
"""Beside a target's weights once they are whole: how they were made."""
DECODING_ROWS = 256
"""Answered at once on a GPU."""


class Budget(NamedTuple):
    """How much is done for one target, beyond what the manifest's demo entry says."""

    num_conversations: int
    num_epochs: int
    tokens_per_batch: int
    eval_fraction: float
    max_new_tokens: int


class Budgets(NamedTuple):
    """How much is done for each target; None is as the manifest says."""

    large_size: Size
    large_corpus: int
    """Conversations that the large target is trained on."""
    large: Budget
    demo: Budget | None


FULL = Budgets(LARGE, 600_000, Budget(2400, 4, 4096, 0.1, 192), None)
SMOKE = Budgets(TINY, 500, Budget(24, 1, 1024, 0.3, 24), Budget(24, 1, 1024, 0.3, 24))


class Variant(NamedTuple):
    """What is in float8. The first one of a run is what the others are compared to."""

    features: FeatureDtype
    float8_matmuls: bool


VARIANTS = (
    Variant("bfloat16", False),
    Variant("float8", False),
    Variant("bfloat16", True),
    Variant("float8", True),
)


class Study(NamedTuple):
    """Where and how much."""

    entry: ManifestEntry
    """The manifest's demo entry."""
    base_dir: Path
    """The manifest's folder."""
    work: Path
    device: str
    budgets: Budgets
    target_minutes: float
    seeds: tuple[int, ...]
    commit: str | None


class Subject(NamedTuple):
    """A target, and what is built for it."""

    studied: StudiedTarget
    target: ResolvedTarget
    entry: ManifestEntry


def main() -> None:
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    path = arguments.out / f"{NAME}.json"
    if arguments.merge:
        result = load_study(path)
        for run in (run for other in arguments.merge for run in load_study(other).runs):
            result = result.plus(run)
        write_study(result, arguments.out)
        return
    manifest = Manifest.load(arguments.manifest)
    with tempfile.TemporaryDirectory() as temporary:
        study = Study(
            entry=next(entry for entry in manifest.entries if entry.name == DEMO_ENTRY),
            base_dir=manifest.base_dir,
            work=arguments.work or Path(temporary),
            device=arguments.device,
            budgets=SMOKE if arguments.smoke else FULL,
            target_minutes=arguments.target_minutes,
            seeds=tuple(range(arguments.seeds)),
            commit=arguments.commit,
        )
        for name in arguments.targets:
            result = load_study(path)
            for run in measured_runs(SUBJECTS[name](study), study):
                write_study(result.plus(run), arguments.out)
    sys.stdout.write(path.with_suffix(".md").read_text(encoding="utf-8"))


def demo_subject(study: Study) -> Subject:
    """The target that ships with the package, as the manifest builds for it."""
    target = resolve_target(study.entry.target, study.base_dir)
    return _subject("demo target", "it ships with this package", target, study.entry, study.budgets.demo)


def large_subject(study: Study) -> Subject:
    """A larger target of the same kind, trained here unless the work folder has it."""
    folder = study.work / "large-target"
    origin = folder / ORIGIN_NAME
    if not origin.exists():
        write_atomically(origin, train_large_target(study, folder))
    dtype = "bfloat16" if study.device == "cuda" else "float32"
    target = resolve_target(TargetConfig(model=str(folder.absolute()), dtype=dtype), study.base_dir)
    return _subject("larger target", origin.read_text(encoding="utf-8"), target, study.entry, study.budgets.large)


SUBJECTS: dict[str, Callable[[Study], Subject]] = {"demo": demo_subject, "large": large_subject}


def train_large_target(study: Study, folder: Path) -> str:
    """How the target that is in the folder now was made, in words."""
    folder.mkdir(parents=True, exist_ok=True)
    demo_folder = Path(resolve_target(study.entry.target, study.base_dir).model)
    for name in TOKENIZER_FILES:
        shutil.copy(demo_folder / name, folder / name)
    num_conversations = study.budgets.large_corpus
    corpus = build_corpus(folder, study.work / "corpus", num_conversations=num_conversations, seed=0)
    torch.manual_seed(0)
    model = new_model(load_tokenizer(folder), study.budgets.large_size).to(study.device)
    # Compiling six shapes takes about as long as it saves in so few minutes.
    plan = Plan(
        minutes=study.target_minutes,
        num_conversations=num_conversations,
        micro_batch_tokens=32_768 if study.device == "cuda" else 1024,
        num_micro_batches=1,
        num_eval_prompts=0,
        max_new_tokens=0,
        compiles=False,
    )
    totals = train_target(model, corpus, plan, seed=0, out=folder)
    logger.info("trained the larger target: %s", totals)
    return (
        f"it was trained for {totals.minutes:.1f} minutes on {totals.tokens_seen / 1e6:.1f} M tokens of the built-in "
        f"corpus, to a loss of {totals.final_train_loss:.3f} nats"
    )


def measured_runs(subject: Subject, study: Study) -> Iterator[StudyRun]:
    """The run after each draft that is done: seed by seed, the variants of one seed one after the other."""
    entry, store = subject.entry, Store(study.work / "store")
    made = {"target": subject.target, "device": study.device}
    conversations = build(
        store,
        RegenerateSpec(
            **made,
            data=resolve_data(entry.data, study.base_dir),
            **({"batch_size": DECODING_ROWS} if study.device == "cuda" else {}),
        ),
    )
    vocabulary = build(
        store,
        VocabularySpec(**made, conversations=conversations.path, draft_vocab_size=entry.draft.draft_vocab_size),
    )
    specs: dict[FeatureDtype, TrainSpec] = {}
    dtypes: tuple[FeatureDtype, ...] = ("bfloat16", "float8")
    for dtype in dtypes:
        hidden_states = build(
            store,
            CaptureSpec(
                **made,
                conversations=conversations.path,
                algorithm=entry.draft.algorithm,
                aux_layers=entry.draft.aux_layers,
                features=entry.features.model_copy(update={"dtype": dtype}),
                max_document_tokens=entry.training.max_document_tokens,
            ),
        )
        specs[dtype] = TrainSpec(
            **made,
            hidden_states=hidden_states.path,
            vocabulary=vocabulary.path,
            draft=entry.draft,
            training=entry.training,
        )
    run = _run_without_drafts(subject, study, conversations.facts, specs)
    can_multiply = study.device == "cuda"
    variants = [variant for variant in VARIANTS if can_multiply or not variant.float8_matmuls]
    for seed in study.seeds:
        for variant in variants:
            outcome = measured_outcome(store, specs, variant, seed)
            logger.info("%s, seed %d: acceptance length %.3f", variant, seed, outcome.acceptance_length)
            run = run.model_copy(update={"outcomes": (*run.outcomes, outcome)})
            yield run


def measured_outcome(store: Store, specs: dict[FeatureDtype, TrainSpec], variant: Variant, seed: int) -> Outcome:
    """A draft trained on the features of the variant, and evaluated on those in bfloat16."""
    training = specs[variant.features].training.model_copy(
        update={"seed": seed, "float8_matmuls": variant.float8_matmuls, "evals_per_run": 1, "checkpoints_per_run": 1}
    )
    artifact = build(store, specs[variant.features].model_copy(update={"training": training}))
    served = evaluated(artifact.path, specs["bfloat16"])
    metrics, positions = served.metrics(), range(len(served.losses.valid_K))
    return Outcome(
        **variant._asdict(),
        seed=seed,
        acceptance_length=served.acceptance_length,
        acceptance=tuple(metrics[f"eval/acceptance_{k}"] for k in positions),
        accuracy=tuple(metrics[f"eval/accuracy_{k}"] for k in positions),
        num_steps=artifact.facts.step,
        training_s=artifact.elapsed_s,
    )


def evaluated(checkpoint: Path, spec: TrainSpec) -> Evaluation:
    """A trained draft on the held-out conversations and features of a spec, as a server would run it."""
    with join_workers(spec.device) as workers:
        features = FeatureSet(spec.hidden_states, max_document_tokens=spec.training.max_document_tokens)
        plan = train.plan_training(features, spec.training, workers.world_size)
        draft = train.create_draft(spec)
        draft.load_state_dict(load_file(checkpoint / train.DRAFT_NAME))
        draft.to(workers.device).compute_dtype = workers.compute_dtype
        return evaluate(draft, train.eval_batches(draft, features, plan, workers), workers)


def build(store: Store, spec: StageSpec) -> Artifact[Any]:
    """The artifact of a stage, made in this process unless the store has it."""
    key = spec.key()
    with store.building(spec.stage, key) as building:
        if found := store.find(spec.stage, key, spec.facts_type):
            return found
        started_at = time.monotonic()
        facts = MAINS[spec.stage](spec, building.directory)
        elapsed_s = time.monotonic() - started_at
        logger.info("%s took %.1f s", spec.stage, elapsed_s)
        seal(building.directory, facts, stage=spec.stage, key=key, inputs=spec.inputs(), elapsed_s=elapsed_s)
        return store.commit(building.directory, spec.stage, key, spec.facts_type)


def _subject(name: str, origin: str, target: ResolvedTarget, entry: ManifestEntry, budget: Budget | None) -> Subject:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(target.model, trust_remote_code=target.trust_remote_code)
    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    if budget:
        (source,) = entry.data.sources
        source = source.model_copy(update={"limit": budget.num_conversations})
        data = {"sources": (source,), "max_new_tokens": budget.max_new_tokens}
        training = {name: getattr(budget, name) for name in ("num_epochs", "tokens_per_batch", "eval_fraction")}
        training["tokens_per_micro_batch"] = budget.tokens_per_batch
        entry = entry.model_copy(
            update={
                "data": entry.data.model_copy(update=data),
                "training": entry.training.model_copy(update=training),
            }
        )
    studied = StudiedTarget(
        name=name,
        num_parameters=num_parameters,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        origin=origin,
    )
    return Subject(studied, target, entry)


def _run_without_drafts(
    subject: Subject, study: Study, conversations: Conversations, specs: dict[FeatureDtype, TrainSpec]
) -> StudyRun:
    training = subject.entry.training
    split = FeatureSet(specs["bfloat16"].hidden_states).split(training.eval_fraction)
    return StudyRun(
        environment=measured_environment(torch.device(study.device), study.commit),
        target=subject.studied,
        conversations=conversations,
        num_held_out=len(split.eval),
        feature_bytes={
            dtype: sum(shard.size_bytes for shard in load_index(spec.hidden_states).shards)
            for dtype, spec in specs.items()
        },
        draft=subject.entry.draft,
        training=training,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specforge_core.training.bench.float8_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=SUBJECTS, default=["demo"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seeds", type=int, default=3, help="drafts of each kind")
    parser.add_argument("--target-minutes", type=float, default=3.0, help="for training the large target")
    parser.add_argument("--manifest", type=Path, default=Path("bundle_manifest.yaml"), help="its demo entry is studied")
    parser.add_argument("--out", type=Path, default=Path("reports/training"))
    parser.add_argument("--work", type=Path, help="folder that keeps what was made; temporary when absent")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="JSON", help="add the runs of these files to --out")
    parser.add_argument("--commit", help="of these sources, where they lie outside a checkout")
    parser.add_argument("--smoke", action="store_true", help="everything runs, nothing is learned")
    return parser


if __name__ == "__main__":
    main()
