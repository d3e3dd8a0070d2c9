"""Training on features that are made meanwhile is training on stored ones, whoever is slow and whoever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from specforge_core.artifacts import seal
from specforge_core.data import spool, vocab
from specforge_core.data.loader import FeatureSet, StoredBatch
from specforge_core.facts import DraftCheckpoint
from specforge_core.manifest_sections import Eagle3Config, FeaturesConfig, TrainingConfig
from specforge_core.stages import CaptureSpec, LiveSource, ResolvedTarget, TrainSpec, UnmeasuredEngine, VocabularySpec
from specforge_core.targets import capture
from specforge_core.training.live import live_features
from specforge_core.training.train import main, plan_training
from specforge_core.training.workers import Workers
from tests.targets.test_capture import make_conversations

ALONE = Workers(0, 1, torch.device("cpu"))
SHAPES = [(3 + i % 5, 6 + 7 * i % 23) for i in range(40)]
DRAFT = Eagle3Config(num_steps=2, draft_vocab_size=64)


def make_spec(inputs: Path, target: ResolvedTarget, *, is_live: bool, **live: object) -> TrainSpec:
    source = LiveSource(engine=UnmeasuredEngine(name="transformers"), **{"batch_tokens": 1, "buffer_gib": 0.01, **live})
    return TrainSpec(
        target=target,
        hidden_states=inputs / "features",
        vocabulary=inputs / "vocabulary",
        draft=DRAFT,
        training=TrainingConfig(
            num_epochs=2,
            tokens_per_batch=192,
            tokens_per_micro_batch=64,
            max_document_tokens=30,
            eval_fraction=0.2,
            evals_per_run=2,
            checkpoints_per_run=6,
        ),
        live=source if is_live else None,
        conversations=inputs / "conversations" if is_live else None,
    )


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
def _memory_of_the_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(spool, "MEMORY", memory)
    # Several processes on few cores: threads that wait for each other take minutes.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    assert list(memory.iterdir()) == [], "a folder was left in memory"


def unprepared(batch):
    return batch


def tensors(stored: StoredBatch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(stored) if isinstance(leaf, Tensor)]


def test_batches_are_those_of_stored_features_bit_for_bit_in_every_epoch(
    tmp_path: Path, inputs: Path, tiny_target: ResolvedTarget
) -> None:
    spec = make_spec(inputs, tiny_target, is_live=True)
    stored = FeatureSet(spec.hidden_states, max_document_tokens=30)
    plan = plan_training(stored, spec.training, 1)
    with live_features(spec, tmp_path, ALONE) as features:
        assert plan_training(features, spec.training, 1) == plan
        features.begin(plan.steps, 2)
        todo = list(chain.from_iterable(plan.steps[2:]))
        batches = features.batches(todo, prepare=unprepared)
        for number, (found, expected) in enumerate(zip(batches, stored.batches(todo, prepare=unprepared), strict=True)):
            if number == 3:
                held_out = features.batches(plan.eval, prepare=unprepared)
                for ours, theirs in zip(held_out, stored.batches(plan.eval, prepare=unprepared), strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(tensors(ours), tensors(theirs), strict=True))
            assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))
        metrics = features.metrics()
    assert set(metrics) == {
        "live/produced_tokens_per_s", "live/producer_wait_share",
        "live/consumed_tokens_per_s", "live/trainer_wait_share",
    }  # fmt: skip
    assert 0 <= metrics["live/producer_wait_share"] < 1
    assert 0 < metrics["live/trainer_wait_share"] < 1


def metrics_of(out: Path) -> list[dict[str, float]]:
    """What was reported, without what a clock measured."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if "tokens_per_s" not in name and not name.startswith("live/")}
        for line in lines
    ]


def command(spec: TrainSpec, out: Path, *launcher: str) -> list[str]:
    out.mkdir(exist_ok=True)
    spec_path = out.with_suffix(".spec.json")
    spec_path.write_text(spec.model_dump_json())
    program = (
        "import sys; from pathlib import Path; from specforge_core.__main__ import main;"
        "from specforge_core.data import spool;"
        f"spool.MEMORY = Path({str(spool.MEMORY)!r}); sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, *launcher, "-c", program, "train", "--spec", str(spec_path), "--out", str(out)]


@pytest.fixture(scope="module")
def stored(
    inputs: Path, tiny_target: ResolvedTarget, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DraftCheckpoint]:
    """A training on stored features, and where it lies."""
    out = tmp_path_factory.mktemp("stored")
    return out, main(make_spec(inputs, tiny_target, is_live=False), out)


def producers_of(pid: int) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process(pid).children(recursive=True)
        if "specforge_core.targets.live" in process.cmdline() and "specforge_core.supervise" not in process.cmdline()
    ]


@pytest.mark.slow
def test_the_result_is_that_of_stored_features_though_producer_and_trainer_are_killed(
    tmp_path: Path, inputs: Path, tiny_target: ResolvedTarget, stored: tuple[Path, DraftCheckpoint]
) -> None:
    # Room for a micro-batch or two: 64 tokens of 1 KiB each.
    spec = make_spec(inputs, tiny_target, is_live=True, buffer_gib=100 / 2**20)
    out = tmp_path / "live"
    trainer = subprocess.Popen(command(spec, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # With so little room the producer never gets far ahead, so it is there all the time.
    killed = None
    while not list(out.glob("progress/checkpoints/step-*")):
        assert trainer.poll() is None, "the training ended before it could be killed"
        if killed is None and (out / "metrics.jsonl").exists() and (found := producers_of(trainer.pid)):
            killed = found[0].pid
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.002)
    assert killed is not None
    (producer,) = producers_of(trainer.pid) or [None]
    trainer.kill()
    trainer.wait()
    if producer is not None:
        # It has nobody to produce for.
        producer.wait(timeout=20)
    log = (out / "progress" / "producer.log").read_text()
    assert log.count("produce:") > 0
    num_lines = len((out / "metrics.jsonl").read_text().splitlines())
    reference, expected = stored
    assert 0 < num_lines < expected.step, "killed too late to show anything"

    assert main(spec, out) == expected
    assert metrics_of(out) == metrics_of(reference)
    assert (out / "draft.safetensors").read_bytes() == (reference / "draft.safetensors").read_bytes()
