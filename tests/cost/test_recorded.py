"""The recorded build of an 8B shape on a GPU, against what the plan says of its tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from specforge_core.cost import check
from specforge_core.cost.comparison import ALLOWED_ERROR
from specforge_core.cost.recorded import RecordedBuild, markdown, recorded_build, recorded_job
from tests.cost.conftest import REPORTS


@pytest.fixture
def report() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((REPORTS / "drafts" / "demo-8b.json").read_text(encoding="utf-8"))
    return values


def test_each_stage_of_the_recorded_build_took_what_the_plan_says_within_a_quarter(report: dict[str, Any]) -> None:
    checked = {stage.stage: stage for stage in recorded_build(report, REPORTS).stages if stage.is_checked}
    # Those of a minute and more; its target and its store are not here.
    assert list(checked) == ["regenerate", "capture", "train", "benchmark"]
    assert {name: stage.error for name, stage in checked.items() if abs(stage.error) > ALLOWED_ERROR} == {}
    # Of rates that others measured alone, regeneration follows as well.
    assert checked["regenerate"].predicted_by_others_s == pytest.approx(checked["regenerate"].measured_s, rel=0.25)


def test_training_with_muon_takes_the_recorded_steps(report: dict[str, Any]) -> None:
    stages = {stage.stage: stage for stage in recorded_build(report, REPORTS).stages}
    # 3,049,740 tokens at the median rate of its curve, 41,786 a second: what remains is start-up.
    assert stages["train"].predicted_s - stages["train"].start_s == pytest.approx(3_049_740 / 41_786, rel=0.15)


def test_the_target_and_the_tokens_are_those_of_the_report(report: dict[str, Any]) -> None:
    job = recorded_job(report, REPORTS)
    assert job.server.model.num_parameters == 8_030_261_248
    assert job.conversations.num_tokens == pytest.approx(267_348, rel=0.01)
    assert job.conversations.num_answer_tokens == pytest.approx(154_058, rel=0.01)
    assert (job.draft.draft_vocab_size, job.entry.training.optimizer) == (1536, "muon")
    report["benchmark"]["environment"]["gpu"] = None
    with pytest.raises(ValueError, match="demo-8b was built without a GPU"):
        recorded_job(report, REPORTS)


def test_the_comparison_is_left_where_it_was_asked_for_as_it_is_committed(tmp_path: Path) -> None:
    arguments = ["--report", str(REPORTS / "drafts" / "demo-8b.json"), "--reports", str(REPORTS)]
    assert check.main([*arguments, "--out", str(tmp_path)]) == 0
    made, committed = (
        RecordedBuild.model_validate_json((folder / "demo-8b.json").read_bytes())
        for folder in (tmp_path, REPORTS / "cost")
    )
    # New rates shift predictions, not what was measured.
    for one, other in zip(made.stages, committed.stages, strict=True):
        assert (one.stage, one.measured_s) == (other.stage, other.measured_s)
        assert one.predicted_s == pytest.approx(other.predicted_s, rel=0.1)
    assert "| train |" in (tmp_path / "demo-8b.md").read_text(encoding="utf-8")


def test_a_stage_that_is_far_off_fails_the_check(tmp_path: Path, report: dict[str, Any]) -> None:
    report["lineage"]["stages"]["train"]["elapsed_s"] = 1000.0
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    assert check.main(["--report", str(path), "--reports", str(REPORTS)]) == 1
    build = recorded_build(report, REPORTS)
    (row,) = [line for line in markdown(build).splitlines() if line.startswith("| train |")]
    assert "| 1000 s | -88% |" in row
