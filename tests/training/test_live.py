"""Training on features that are made meanwhile is training on stored ones, whoever is slow and whoever dies."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from specforge_core.artifacts import load_artifact, seal
from specforge_core.data import spool, vocab
from specforge_core.data.loader import FeatureSet, StoredBatch
from specforge_core.data.spool import ProducerFailed
from specforge_core.drafts.base import DraftBatch
from specforge_core.facts import DraftCheckpoint
from specforge_core.manifest_sections import Eagle3Config, FeaturesConfig, ParallelConfig, TrainingConfig
from specforge_core.stages import CaptureSpec, LiveSource, ResolvedTarget, TrainSpec, UnmeasuredEngine, VocabularySpec
from specforge_core.targets import capture
from specforge_core.training import live
from specforge_core.training.live import live_features, slower_side
from specforge_core.training.train import main, plan_training
from specforge_core.training.workers import Workers
from tests.sglang_like import Behaviour
from tests.targets.test_capture import make_conversations
from tests.training.live_producer import JOURNAL_VARIABLE, MEMORY_VARIABLE, PAUSE_VARIABLE

ALONE = Workers(0, 1, torch.device("cpu"))
SHAPES = [(3 + i % 5, 6 + 7 * i % 23) for i in range(40)]
CLOCKED = ("train/tokens_per_s", "train/supervised_tokens_per_s")
ITEM_GIB = 64 * 1040 / 2**30
"""Of a micro-batch: 64 tokens of four vectors of 64 float32 and a little more."""

TRAINING = TrainingConfig(
    num_epochs=2,
    tokens_per_batch=192,
    tokens_per_micro_batch=64,
    max_document_tokens=30,
    eval_fraction=0.2,
    evals_per_run=2,
    checkpoints_per_run=6,
)


def make_spec(inputs: Path, target: ResolvedTarget, live: LiveSource | None) -> TrainSpec:
    return TrainSpec(
        target=target,
        hidden_states=inputs / "features",
        vocabulary=inputs / "vocabulary",
        draft=Eagle3Config(num_steps=2, draft_vocab_size=64),
        training=TRAINING,
        live=live,
        conversations=inputs / "conversations" if live else None,
    )


def source(engine: str = "transformers", *, num_items: float = 2, batch_tokens: int = 1) -> LiveSource:
    """Args: num_items: that the buffer holds; batch_tokens: 1 computes each document by itself."""
    return LiveSource(engine=UnmeasuredEngine(name=engine), batch_tokens=batch_tokens, buffer_gib=num_items * ITEM_GIB)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_target: ResolvedTarget) -> Path:
    """Conversations, and what the stages between them and training make of them."""
    directory = tmp_path_factory.mktemp("live-inputs")
    conversations = make_conversations(directory / "conversations", SHAPES)
    capture_spec = CaptureSpec(
        target=tiny_target,
        conversations=conversations,
        algorithm="eagle3",
        aux_layers=None,
        features=FeaturesConfig(dtype="float32", tokens_per_shard=200),
        max_document_tokens=30,
        # Each document by itself, as the producer does: so that not even the sums are in another order.
        batch_tokens=1,
    )
    vocabulary_spec = VocabularySpec(target=tiny_target, conversations=conversations, draft_vocab_size=64)
    for name, run, spec in (("features", capture.main, capture_spec), ("vocabulary", vocab.main, vocabulary_spec)):
        (directory / name).mkdir()
        facts = run(spec, directory / name)
        seal(directory / name, facts, stage=spec.stage, key=name, inputs={}, elapsed_s=0.0)
    return directory


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(spool, "MEMORY", memory)
    monkeypatch.setattr(live, "PRODUCER_MODULE", "tests.training.live_producer")
    monkeypatch.setenv(MEMORY_VARIABLE, str(memory))
    monkeypatch.setenv(JOURNAL_VARIABLE, str(tmp_path / "journal"))
    monkeypatch.setenv(*Behaviour(answers="model").variable())
    # Several processes on few cores: threads that wait for each other take minutes.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    assert list(memory.iterdir()) == [], "a folder was left in memory"


def made(tmp_path: Path) -> list[tuple[int, int]]:
    """Process and number, of each item so far."""
    journal = tmp_path / "journal"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [(int(pid), int(number)) for pid, number in map(str.split, lines)]


def unprepared(batch: DraftBatch) -> DraftBatch:
    return batch


def tensors(stored: StoredBatch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(stored) if isinstance(leaf, Tensor)]


def check_same(found: StoredBatch, expected: StoredBatch, *, atol: float = 0.0) -> None:
    for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def check_batches(spec: TrainSpec, tmp_path: Path, *, first_step: int, atol: float) -> dict[str, float]:
    """Read all batches from that step on, and compare. The producer is killed once. Returns: the metrics."""
    stored = FeatureSet(spec.hidden_states, max_document_tokens=30)
    plan = plan_training(stored, TRAINING, 1)
    todo = list(chain.from_iterable(plan.steps[first_step:]))
    with live_features(spec, tmp_path, ALONE) as features:
        assert plan_training(features, TRAINING, 1) == plan
        features.begin(plan.steps, first_step)
        batches = features.batches(todo, prepare=unprepared)
        for number, expected in enumerate(stored.batches(todo, prepare=unprepared)):
            check_same(next(batches), expected, atol=atol)
            if number == 3:
                os.kill(made(tmp_path)[-1][0], signal.SIGKILL)
                held_out = features.batches(plan.eval, prepare=unprepared)
                for ours, theirs in zip(held_out, stored.batches(plan.eval, prepare=unprepared), strict=True):
                    check_same(ours, theirs)
        assert next(batches, None) is None
        metrics = features.metrics()
    first = sum(map(len, plan.steps[:first_step]))
    numbers = Counter(number for _, number in made(tmp_path))
    assert set(numbers.values()) == {1}
    # One may have been handed on and not noted when its maker was killed.
    assert set(numbers) <= set(range(first, first + len(todo)))
    assert len(numbers) >= len(todo) - 1
    assert len({pid for pid, _ in made(tmp_path)}) == 2
    return metrics


def test_batches_are_those_of_stored_features_bit_for_bit_though_their_producer_is_killed(
    tmp_path: Path, inputs: Path, tiny_target: ResolvedTarget
) -> None:
    metrics = check_batches(make_spec(inputs, tiny_target, source()), tmp_path, first_step=2, atol=0.0)
    assert set(metrics) == {
        "live/produced_tokens_per_s", "live/producer_wait_share",
        "live/consumed_tokens_per_s", "live/trainer_wait_share",
    }  # fmt: skip
    assert 0 <= metrics["live/producer_wait_share"] < 1
    # Most of the time a producer was starting.
    assert 0.5 < metrics["live/trainer_wait_share"] < 1
    assert metrics["live/consumed_tokens_per_s"] > 0


@pytest.mark.slow
def test_batches_from_a_server_are_those_of_stored_features(
    tmp_path: Path, inputs: Path, tiny_target: ResolvedTarget
) -> None:
    spec = make_spec(inputs, tiny_target, source("sglang", batch_tokens=64))
    check_batches(spec, tmp_path, first_step=0, atol=1e-4)


def metrics_of(out: Path) -> list[dict[str, float]]:
    """What was reported, without what a clock measured."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in CLOCKED and not name.startswith("live/")}
        for line in lines
    ]


PROGRAM = """
import os, sys
from pathlib import Path
from specforge_core.data import spool
from specforge_core.training import live
from tests.training.live_producer import MEMORY_VARIABLE
spool.MEMORY, live.PRODUCER_MODULE = Path(os.environ[MEMORY_VARIABLE]), "tests.training.live_producer"
from specforge_core.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def command(spec: TrainSpec, out: Path, *launcher: str) -> list[str]:
    out.mkdir()
    spec_path, program = out.with_suffix(".spec.json"), out.with_suffix(".py")
    spec_path.write_text(spec.model_dump_json())
    program.write_text(PROGRAM)
    return [sys.executable, *launcher, str(program), "train", "--spec", str(spec_path), "--out", str(out)]


@pytest.fixture(scope="module")
def stored(
    inputs: Path, tiny_target: ResolvedTarget, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DraftCheckpoint]:
    """A training on stored features, and where it lies."""
    out = tmp_path_factory.mktemp("stored")
    return out, main(make_spec(inputs, tiny_target, None), out)


@pytest.mark.slow
def test_the_result_is_that_of_stored_features_though_producer_and_trainer_are_killed(
    tmp_path: Path,
    inputs: Path,
    tiny_target: ResolvedTarget,
    stored: tuple[Path, DraftCheckpoint],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    spec, out = make_spec(inputs, tiny_target, source()), tmp_path / "live"
    trainer = subprocess.Popen(command(spec, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = 0
    while not list(out.glob("progress/checkpoints/step-*")):
        assert trainer.poll() is None, "the training ended before it could be killed"
        if not killed and made(tmp_path):
            killed = made(tmp_path)[0][0]
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.002)
    producer = psutil.Process(made(tmp_path)[-1][0])
    trainer.kill()
    trainer.wait()
    # It has nobody to produce for, and takes the folder in memory with it.
    producer.wait(timeout=20)
    assert list((tmp_path / "memory").iterdir()) == []
    assert killed
    assert killed != producer.pid
    numbers = Counter(number for _, number in made(tmp_path))
    assert set(numbers.values()) == {1}
    reference, expected = stored
    assert 0 < len(metrics_of(out)) < expected.step, "killed too late to show anything"

    assert main(spec, out) == expected
    assert metrics_of(out) == metrics_of(reference)
    assert (out / "draft.safetensors").read_bytes() == (reference / "draft.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("cp", [1, 2])
def test_two_processes_train_on_one_producer_what_one_trains_on_stored_features(
    tmp_path: Path,
    inputs: Path,
    tiny_target: ResolvedTarget,
    stored: tuple[Path, DraftCheckpoint],
    monkeypatch: pytest.MonkeyPatch,
    cp: int,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    spec, out = make_spec(inputs, tiny_target, source()), tmp_path / "two"
    # Of dp the two take items in turn, of cp both read each one.
    training = TRAINING.model_copy(update={"parallel": ParallelConfig(cp=cp)})
    spec = spec.model_copy(update={"training": training})
    done = subprocess.run(command(spec, out, *launcher), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = load_artifact(out, DraftCheckpoint).facts
    reference, expected = stored
    assert (facts.step, facts.tokens_seen) == (expected.step, expected.tokens_seen)
    assert len(metrics_of(out)) == len(metrics_of(reference))
    for ours, theirs in zip(metrics_of(out), metrics_of(reference), strict=True):
        # float32 sums in another order.
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert set(Counter(number for _, number in made(tmp_path)).values()) == {1}


def test_the_target_gets_the_last_gpus_and_nothing_of_the_launcher_of_ranks(
    tmp_path: Path, inputs: Path, tiny_target: ResolvedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = []

    def note(spec: TrainSpec, spool: Path, out: Path, environment: dict[str, str]) -> AbstractContextManager[None]:
        environments.append(environment)
        return nullcontext()

    monkeypatch.setattr(live, "Producer", note)
    monkeypatch.setattr(live, "visible_devices", lambda: ("0", "1", "GPU-2", "GPU-3"))
    for name in ("RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    live_source = source("sglang").model_copy(update={"serve_gpus": 2})
    with live_features(make_spec(inputs, tiny_target, live_source), tmp_path, ALONE) as features:
        features.begin(plan_training(features, TRAINING, 1).steps, 0)
    (environment,) = environments
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-2,GPU-3"
    assert environment[MEMORY_VARIABLE] == os.environ[MEMORY_VARIABLE]
    assert not {"RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(environment)


@pytest.mark.slow
def test_all_that_torchrun_sets_is_kept_from_the_target(tmp_path: Path) -> None:
    # In a file of each rank: its variables as the producer would have them.
    program = (
        "import json, os, sys; from pathlib import Path;"
        "from specforge_core.training.live import producer_environment;"
        "Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps(sorted(producer_environment(os.environ, []))))"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", sys.executable]
    subprocess.run([sys.executable, *launcher, "-c", program, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    kept = set(json.loads((tmp_path / "1").read_text()))
    # The last two are Python's own, of a terminal.
    assert kept - set(os.environ) <= {"CUDA_VISIBLE_DEVICES", "COLUMNS", "LINES"}


@pytest.mark.parametrize(
    ("produced", "consumed", "trainer_waits", "producer_waits", "expected"),
    [
        (300.0, 400.0, 0.2, 0.0, "target"),
        (400.0, 300.0, 0.0, 0.2, "training"),
        # It waited for the start, or for a core.
        (393.0, 313.0, 0.2, 0.0, ""),
        (313.0, 393.0, 0.0, 0.2, ""),
        (300.0, 400.0, 0.01, 0.0, ""),
    ],
)
def test_a_side_is_the_slower_where_waits_and_rates_agree(
    produced: float, consumed: float, trainer_waits: float, producer_waits: float, expected: str
) -> None:
    metrics = {
        "live/produced_tokens_per_s": produced,
        "live/consumed_tokens_per_s": consumed,
        "live/trainer_wait_share": trainer_waits,
        "live/producer_wait_share": producer_waits,
    }
    assert slower_side(metrics) == expected


@pytest.mark.slow
def test_who_is_slower_is_said(
    tmp_path: Path,
    inputs: Path,
    tiny_target: ResolvedTarget,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = make_spec(inputs, tiny_target, source())
    for pause_s, training_s, slower in ((0.1, 0.0, "the target"), (0.0, 0.1, "the training")):
        monkeypatch.setenv(PAUSE_VARIABLE, str(pause_s))
        caplog.clear()
        with live_features(spec, tmp_path, ALONE) as features, caplog.at_level(logging.INFO):
            plan = plan_training(features, TRAINING, 1)
            features.begin(plan.steps, 0)
            for number, _ in enumerate(features.batches(list(chain.from_iterable(plan.steps)), prepare=unprepared)):
                # The first ones waited for the start.
                if number == 4:
                    features.metrics()
                time.sleep(training_s)
            metrics = features.metrics()
        # No GPU serves, so none of them could be moved.
        assert re.search(f"the slower is {slower}$", caplog.text, re.MULTILINE)
        share = "live/trainer_wait_share" if pause_s else "live/producer_wait_share"
        assert metrics[share] > 0.3


@pytest.mark.slow
def test_what_a_user_must_change_ends_the_training_with_what_the_producer_says(
    tmp_path: Path, inputs: Path, tiny_target: ResolvedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*Behaviour(answers="model", lacks=("--forward-hooks",)).variable())
    with live_features(make_spec(inputs, tiny_target, source("sglang")), tmp_path, ALONE) as features:
        plan = plan_training(features, TRAINING, 1)
        features.begin(plan.steps, 0)
        batches = features.batches(list(chain.from_iterable(plan.steps)), prepare=unprepared)
        with pytest.raises(ProducerFailed, match="--forward-hooks"):
            next(batches)
