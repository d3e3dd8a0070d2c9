"""Lines through measurements, and how well the recorded ones predict each other."""

import json
from pathlib import Path

import pytest

from specforge_core.cost.check import held_out, recorded_checks
from specforge_core.cost.comparison import ALLOWED_ERROR
from specforge_core.cost.configs import hub_facts
from specforge_core.cost.hardware import find_hardware
from specforge_core.cost.rates import Line, Point, Rates, fit_line, load_rates, mean_running, sweep_points
from specforge_core.cost.target_model import target_model
from specforge_core.facts import SweepPoint
from specforge_core.manifest_sections import ServingConfig, TargetConfig
from tests.cost.conftest import REPORTS


def test_a_line_is_found_again() -> None:
    line = fit_line([Point(work, 3.0 * work + 5.0) for work in (1.0, 10.0, 200.0)])
    assert line == pytest.approx(Line(3.0, 5.0))
    # Twice as fast hardware halves the work, not the overhead.
    assert line.seconds(10.0, speed=2.0) == pytest.approx(3.0 * 10 / 2 + 5.0)


def test_one_measurement_or_a_line_below_the_origin_gives_one_through_the_origin() -> None:
    assert fit_line([Point(4.0, 8.0)]) == Line(2.0, 0.0)
    # 2x - 1 fits both; of lines a x, a (1/1 + 2/3) = 1 + ... : a = (1 + 2/3) / (1 + 4/9)
    assert fit_line([Point(1.0, 1.0), Point(2.0, 3.0)]) == pytest.approx(Line((1 + 2 / 3) / (1 + 4 / 9), 0.0))
    with pytest.raises(ValueError, match="no measurements"):
        fit_line([])


def test_every_recorded_row_is_predicted_from_those_of_other_shapes_within_a_quarter(rates: Rates) -> None:
    checks = recorded_checks(rates)
    shapes = {"qwen3-8b", "qwen3-30b-a3b", "llama-3.3-70b", "qwen3-235b-a22b", "llama-3.1-8b"}
    assert {f"training pass, {shape}" for shape in shapes} <= {check.what for check in checks}
    assert "training, llama-3.1-8b, 50% in answers, 8 passes a step" in {check.what for check in checks}
    assert [check for check in checks if not check.is_close] == []


def test_the_other_shapes_follow_from_llama_8b_alone_within_a_tenth(rates: Rates) -> None:
    line = fit_line([point for point in rates.passes if point.name == "llama-3.1-8b"])
    others = [point for point in rates.passes if point.name != "llama-3.1-8b"]
    assert len(others) == 4
    for point in others:
        assert line.seconds(point.work) == pytest.approx(point.seconds, rel=0.1), point.name


def test_a_row_that_is_far_off_is_found() -> None:
    points = [Point(work, 2.0 * work, str(work)) for work in (1.0, 2.0, 4.0)]
    odd = [*points, Point(8.0, 8.0, "odd")]
    errors = {check.what: check.error for check in held_out("row", odd)}
    assert errors["row, odd"] == pytest.approx(1.0)
    assert ALLOWED_ERROR < 1.0


def test_the_reference_is_the_gpu_that_was_measured(rates: Rates) -> None:
    assert rates.hardware == find_hardware("NVIDIA H100 80GB HBM3")
    # Nobody measured it, so rates come from the one that was.
    assert load_rates(REPORTS, find_hardware("h200")) == rates
    assert "llama-3.3-70b" in rates.source


def test_rates_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no GPU's rates .* --reports"):
        load_rates(tmp_path)


def test_gpus_go_by_their_own_name_and_by_the_drivers() -> None:
    assert find_hardware("NVIDIA H100 PCIe").name == "h100-pcie"
    assert find_hardware("NVIDIA A100-SXM4-80GB").name == "a100"
    assert find_hardware("NVIDIA A100-SXM4-40GB").name == "a100-40gb"
    with pytest.raises(ValueError, match='no figures of the GPU "tpu"; there are those of h100-pcie, h100'):
        find_hardware("tpu")


def test_slots_are_empty_while_the_last_answer_is_written() -> None:
    assert mean_running([5, 9, 7], 1, 6) == 1.0
    # Slots get 4, then 2 and 6 as they become free: (4, 2), (4, 8): 12 tokens in 8 steps.
    assert mean_running([4, 2, 6], 2, 3) == 12 / 8
    # From the front again: 4, 2, 6, 4 are (4 + 4, 2 + 6).
    assert mean_running([4, 2, 6], 2, 4) == 2.0


def test_a_sweep_of_servers_adds_a_point_for_each_load(rates: Rates) -> None:
    report = json.loads((REPORTS / "drafts" / "demo.json").read_text(encoding="utf-8"))
    model = target_model(hub_facts()["configs"]["meta-llama/Llama-3.1-8B-Instruct"], TargetConfig(model="any"))
    # Every answer is cut at 8 tokens, so all slots end together, at 2.5 TB/s and 20 ms for each answer; its prompt of
    # 38 tokens is read in as long as capture takes for its FLOPs.
    prompt_s = 38 * (2 * 6_979_588_096 + 524_288 * 19) / 500e12
    seconds = {slots: 8 * model.decode_bytes(slots, 128) / 2.5e12 / slots + 20e-3 + prompt_s for slots in (1, 8, 64)}
    report["benchmark"] |= {
        "engine": "sglang",
        "environment": report["benchmark"]["environment"] | {"gpu": "NVIDIA H100 80GB HBM3"},
        "sweep": [
            SweepPoint(
                serving=ServingConfig(concurrency=slots),
                num_requests=4 * slots,
                num_output_tokens=4 * slots * 8,
                num_verify_steps=1,
                baseline_output_tokens_per_s=(8 / answer_s, 8 / answer_s),
                output_tokens_per_s=(1.0,),
            ).model_dump(mode="json")
            for slots, answer_s in seconds.items()
        ],
    }
    report["lineage"]["entry"]["benchmark"]["sweep"] = {"max_new_tokens": 8}
    lengths = {"ids_digest": "", "num_output_tokens": [12, 30], "num_verify_steps": [5, 9]}
    report["benchmark"]["measurements"][0]["prompts"] = lengths
    assert sweep_points(report, rates.hardware, 1 / 500e12) == []
    report["hidden_states"] |= {"num_target_layers": 32, "hidden_size": 4096}
    report["vocabulary"] |= {"target_vocab_size": 128_256}
    points = sweep_points(report, rates.hardware, 1 / 500e12)
    assert [point.name for point in points] == ["demo, 1 at once", "demo, 8 at once", "demo, 64 at once"]
    assert [point.beside for point in points] == pytest.approx([prompt_s] * 3)
    assert fit_line(points) == pytest.approx(Line(1 / 2.5e12, 20e-3))
    assert sweep_points(report, find_hardware("h200"), 1 / 500e12) == []
    # Reports from before the lengths of answers were kept do not say how many ran at once.
    for measurement in report["benchmark"]["measurements"]:
        measurement["prompts"] = None
    assert sweep_points(report, rates.hardware, 1 / 500e12) == []


def test_the_sweeps_rows_predict_the_row_of_regeneration(rates: Rates) -> None:
    (regenerated,) = [check for check in recorded_checks(rates) if check.what.startswith("answer, 384 prompts")]
    assert regenerated.is_close
    # What they say of the card: two thirds of its bandwidth, and some milliseconds for each prompt.
    line = fit_line([point for point in rates.answers if point.name.startswith("demo-8b, ")])
    assert 0.5 < 1 / line.s_per_unit / find_hardware("h100").memory_bytes_per_s < 0.8
    assert 0.005 < line.fixed_s < 0.02
