"""The study of float8: its report by hand, and the whole of it on targets that learn nothing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specforge_core.facts import Conversations, Environment
from specforge_core.manifest_sections import Eagle3Config, TrainingConfig
from specforge_core.training.bench import float8_study
from specforge_core.training.bench.float8_results import (
    Float8Study,
    Outcome,
    StudiedTarget,
    StudyRun,
    load_study,
    markdown,
    write_study,
)

ROOT = Path(__file__).parents[2]
STUDY = [sys.executable, "-m", "specforge_core.training.bench.float8_study"]


def make_outcome(features: Any, seed: int, acceptance_length: float, acceptance: float) -> Outcome:
    return Outcome(
        features=features,
        float8_matmuls=False,
        seed=seed,
        acceptance_length=acceptance_length,
        acceptance=(acceptance, 0.5),
        accuracy=(0.75, 0.25),
        num_steps=7,
        training_s=2.0,
    )


def make_run(*outcomes: Outcome, target: str = "small", gpu: str | None = None) -> StudyRun:
    return StudyRun(
        environment=Environment(
            cpu="a CPU", num_threads=2, gpu=gpu, versions={"torch": "2"}, commit="abc", command="python"
        ),
        target=StudiedTarget(name=target, num_parameters=5, num_layers=4, hidden_size=3, origin="it was there"),
        conversations=Conversations(
            num_conversations=9,
            num_tokens=90,
            num_loss_tokens=45,
            num_failed=0,
            num_cut_off=1,
            chat_template_sha256="0",
        ),
        num_held_out=2,
        feature_bytes={"bfloat16": 2**20, "float8": 2**19},
        draft=Eagle3Config(num_steps=2),
        training=TrainingConfig(),
        outcomes=outcomes,
    )


def test_differences_are_between_drafts_of_one_seed() -> None:
    # Seed by seed 0.1 more and 0.3 less; unpaired, the means alone would say 0.1 less without any spread.
    outcomes = [
        make_outcome("bfloat16", 0, 2.0, 0.7),
        make_outcome("float8", 0, 2.1, 0.7),
        make_outcome("bfloat16", 1, 3.0, 0.8),
        make_outcome("float8", 1, 2.7, 0.6),
    ]
    table = [line for line in markdown(Float8Study(runs=(make_run(*outcomes),))).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    exact, float8 = (dict(zip(cells[0], row, strict=True)) for row in cells[2:])
    assert exact["acceptance length"] == "2.500 (2.000 to 3.000)"
    assert exact["difference"] == "-"
    assert float8["acceptance length"] == "2.400 (2.100 to 2.700)"
    assert float8["difference"] == "-0.100 (-0.300 to +0.100)"
    assert float8["expected acceptance by position"] == "65.0%, 50.0%"
    assert float8["greedy matches by position"] == "75.0%, 25.0%"


def test_runs_of_several_machines_are_merged_and_a_repeated_one_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    old, other = make_run(make_outcome("bfloat16", 0, 2.0, 0.5)), make_run(target="large")
    new, on_gpu = make_run(make_outcome("bfloat16", 0, 2.5, 0.5)), make_run(gpu="a GPU")
    write_study(Float8Study().plus(old).plus(other), here)
    write_study(Float8Study().plus(new).plus(on_gpu), there)
    monkeypatch.setattr("sys.argv", ["float8_study", "--merge", str(there / "float8.json"), "--out", str(here)])
    float8_study.main()
    assert load_study(here / "float8.json").runs == (other, new, on_gpu)
    assert "2.500" in (here / "float8.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_smoke_run_measures_drafts_with_and_without_float8_features(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    command = [*STUDY, "--smoke", "--targets", "demo", "large", "--seeds", "2", "--target-minutes", "0.6"]
    # Named, as the checkout's may change between the two runs.
    command += ["--out", str(out), "--work", str(work), "--commit", "abc"]
    subprocess.run(command, cwd=ROOT, check=True)
    study = load_study(out / "float8.json")
    assert [run.target.name for run in study.runs] == ["demo target", "larger target"]
    for run in study.runs:
        assert run.environment.commit == "abc"
        kinds = [(outcome.seed, outcome.features, outcome.float8_matmuls) for outcome in run.outcomes]
        # A CPU has no matrix units for float8.
        assert kinds == [(seed, features, False) for seed in (0, 1) for features in ("bfloat16", "float8")]
        assert run.feature_bytes["float8"] < 0.6 * run.feature_bytes["bfloat16"]
        exact, float8 = run.outcomes[:2]
        assert exact.acceptance != float8.acceptance
        assert exact.acceptance == pytest.approx(float8.acceptance, abs=0.02)
        assert exact.num_steps == float8.num_steps > 0
    # What is in the work folder is not made again: neither trainings, nor the target, whose weights no run repeats.
    made = sorted(path.parent.name for path in (work / "store").glob("*/*/artifact.json"))
    subprocess.run(command, cwd=ROOT, check=True)
    assert sorted(path.parent.name for path in (work / "store").glob("*/*/artifact.json")) == made
    assert load_study(out / "float8.json").runs == study.runs
