"""The training stage as a whole: it learns, survives a kill, and is the same on two processes."""

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from specforge_core.data.loader import FeatureSet
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.facts import DraftCheckpoint
from specforge_core.stages import TrainSpec
from specforge_core.training.checkpoint import checkpoints
from specforge_core.training.metrics import milestones
from specforge_core.training.train import DRAFT_CONFIG_NAME, DRAFT_NAME, main, plan_training
from tests.drafts.synthetic import make_head
from tests.processes import start
from tests.training.factory import make_spec
from tests.training.hanging_save import hanging_main

# Measured by a clock, so never equal.
CLOCKED = ("train/tokens_per_s", "train/supervised_tokens_per_s")


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKED} for line in lines]


def run(spec: TrainSpec, out: Path) -> DraftCheckpoint:
    out.mkdir(exist_ok=True)
    return main(spec, out)


def arguments(spec: TrainSpec, out: Path) -> list[str]:
    """Of the stage, as a command line."""
    spec_path = out.with_suffix(".spec.json")
    spec_path.write_text(spec.model_dump_json())
    return ["train", "--spec", str(spec_path), "--out", str(out)]


def last_step(out: Path) -> int:
    """The last one that was reported."""
    text = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSpec, Path, DraftCheckpoint]:
    spec = make_spec(inputs, num_epochs=2, checkpoints_per_run=8)
    out = tmp_path_factory.mktemp("undisturbed")
    return spec, out, run(spec, out)


def test_the_draft_learns_and_its_facts_are_those_of_the_last_evaluation(undisturbed):
    _, out, facts = undisturbed
    lines = metrics(out)
    evaluations = [line for line in lines if "eval/loss" in line]
    assert len(evaluations) == 2
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"] < lines[0]["train/loss"]
    assert evaluations[-1]["step"] == facts.step == len(lines)
    assert facts.eval_loss == evaluations[-1]["eval/loss"]
    assert facts.eval_accuracy[0] == evaluations[-1]["eval/accuracy_0"] > 1.5 / 8
    assert facts.eval_acceptance_length == evaluations[-1]["eval/acceptance_length"] > 1.1
    assert len(facts.eval_acceptance) == 3


def test_the_draft_that_leaves_the_stage_is_the_one_of_the_best_evaluation(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    # The learning rate rises nearly to the end, far beyond what throws the draft back from what it has learnt.
    spec = make_spec(inputs, learning_rate=0.5, warmup_fraction=0.9, evals_per_run=4)
    with caplog.at_level(logging.INFO):
        facts = run(spec, tmp_path / "out")
    evaluations = [line for line in metrics(tmp_path / "out") if "eval/loss" in line]
    best = max(evaluations, key=lambda line: line["eval/acceptance_length"])
    assert best["step"] < evaluations[-1]["step"], "the last is the best, so nothing is shown"
    assert facts.step == best["step"]
    # Nothing goes on from there.
    assert re.search(rf"the draft is the best one .*/step-{best['step']:08d}$", caplog.text, re.MULTILINE)
    assert "going on" not in caplog.text
    assert (facts.eval_acceptance_length, facts.eval_loss) == (best["eval/acceptance_length"], best["eval/loss"])
    assert facts.tokens_seen < 0.9 * tokens_of_an_epoch(spec)


def tokens_of_an_epoch(spec: TrainSpec) -> int:
    features = FeatureSet(spec.hidden_states)
    return sum(features.lengths[i] for i in features.split(0.2).train)


def test_every_packed_token_is_counted(undisturbed):
    spec, _, facts = undisturbed
    assert facts.tokens_seen == 2 * tokens_of_an_epoch(spec)


def test_the_output_is_a_draft_that_can_be_decoded_with(undisturbed):
    _, out, facts = undisturbed
    config = json.loads((out / DRAFT_CONFIG_NAME).read_text())
    draft = Eagle3Draft.from_serving(config, load_file(out / DRAFT_NAME), make_head().embedding_VD)
    assert sum(parameter.numel() for parameter in draft.parameters()) == facts.num_parameters


def test_training_goes_on_while_a_checkpoint_is_written_and_killed_there_ends_in_the_same_bits(
    undisturbed, tmp_path: Path
):
    spec, reference, expected = undisturbed
    out = tmp_path / "killed"
    first, second, third = sorted(milestones(expected.step, spec.training.checkpoints_per_run))[:3]
    child = start(hanging_main, second, arguments(spec, out))
    # It waits when the next one is due.
    while last_step(out) < third:
        assert child.is_alive(), "the training ended before it could be killed"
        time.sleep(0.01)
    directory = out / "progress" / "checkpoints"
    assert [path.name for path in checkpoints(directory)] == [f"step-{first:08d}"]
    assert list(directory.glob(f".step-{second:08d}*/*.distcp"))
    child.kill()
    child.join()

    assert run(spec, out) == expected
    assert metrics(out) == metrics(reference)
    assert (out / DRAFT_NAME).read_bytes() == (reference / DRAFT_NAME).read_bytes()
    assert not list(directory.glob(".step*"))


def refused(inputs: Path, tmp_path: Path, match: str, **training: Any) -> None:
    with pytest.raises(ValueError, match=match):
        run(make_spec(inputs, **training), tmp_path / "refused")


def test_more_processes_than_micro_batches_are_refused(inputs: Path):
    spec = make_spec(inputs)
    features = FeatureSet(spec.hidden_states)
    with pytest.raises(ValueError, match=r"3 micro-batches of 48 tokens for 4 processes; raise .* to 192"):
        plan_training(features, spec.training, 4)


def test_nothing_held_out_is_refused(inputs: Path, tmp_path: Path):
    refused(inputs, tmp_path, "eval_fraction=1e-09", eval_fraction=1e-9)


def test_float8_products_on_a_device_that_has_none_are_refused(inputs: Path, tmp_path: Path):
    refused(
        inputs, tmp_path, r"training\.float8_matmuls=true needs a GPU .* the CPU; set it to false", float8_matmuls=True
    )


def test_a_diverging_loss_stops_the_run(inputs: Path, tmp_path: Path):
    with pytest.raises(FloatingPointError, match=r"lower training\.learning_rate"):
        run(make_spec(inputs, learning_rate=1e25, max_grad_norm=1e30), tmp_path / "diverged")
