"""Two GPUs and live features, as measured, beside what one GPU of another kind says of them."""

import json
from pathlib import Path

import pytest

from specforge_core.cost.check import main
from specforge_core.cost.comparison import ALLOWED_ERROR
from specforge_core.cost.rates import Rates
from specforge_core.cost.scaling import scaling_checks
from tests.cost.conftest import REPORTS


def test_trainings_on_two_h200_follow_from_one_h100_within_a_tenth(rates: Rates) -> None:
    assert rates.hardware.name == "h100"
    checks = scaling_checks(rates, REPORTS)
    errors = {check.what: check.error for check in checks if not check.what.startswith("memory of ")}
    meshes = {what.partition(", ")[2].rsplit(", ", 2)[0] for what in errors if "dp " in what}
    assert meshes == {"dp 2 x cp 1 x tp 1", "dp 1 x cp 2 x tp 1", "dp 1 x cp 1 x tp 2"}
    assert sum("131,072 tokens a document" in what for what in errors) == 1
    assert sum("real lengths" in what for what in errors) == 1
    assert sum("live features" in what for what in errors) == 2
    assert {what: error for what, error in errors.items() if abs(error) > 0.1} == {}


def test_so_does_their_memory_within_a_quarter(rates: Rates) -> None:
    checks = scaling_checks(rates, REPORTS)
    errors = {check.what: check.error for check in checks if check.what.startswith("memory of ")}
    assert {what for what, error in errors.items() if abs(error) > ALLOWED_ERROR} == set()
    # All rows supervised. With few, less is kept of each token.
    assert {what for what, error in errors.items() if "100%" in what and abs(error) > 0.05} == set()
    assert sum("tp 2" in what for what in errors) == 1
    assert sum("131,072 tokens a document" in what for what in errors) == 1


def test_live_features_take_as_long_as_the_slower_side(rates: Rates) -> None:
    predicted = {one.what: one.predicted for one in scaling_checks(rates, REPORTS)}
    for share, slower in (("50%", "serving alone"), ("100%", "training alone")):
        of_share = {what: seconds for what, seconds in predicted.items() if f" {share} in answers" in what}
        live = next(seconds for what, seconds in of_share.items() if what.startswith("live"))
        assert live == next(seconds for what, seconds in of_share.items() if what.startswith(slower))


def test_a_recorded_row_that_is_far_off_fails_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("training", "serving", "drafts"):
        (tmp_path / name).mkdir()
        for path in (REPORTS / name).glob("*.json"):
            (tmp_path / name / path.name).symlink_to(path)
    assert main(["--reports", str(tmp_path)]) == 0
    recorded = tmp_path / "training/nvidia-h200-live.json"
    bench = json.loads(recorded.read_text())
    for interval in bench["train_alone"]["intervals"]:
        interval["elapsed_s"] *= 2
    recorded.unlink()
    recorded.write_text(json.dumps(bench))
    assert main(["--reports", str(tmp_path)]) == 1
    assert "-46%" in capsys.readouterr().out
