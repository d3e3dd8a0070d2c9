"""The card says what was measured, in a form that the Hub's own library reads back."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from specforge_core.benchmark.report import EntryReport, make_report
from specforge_core.facts import BenchmarkResult
from specforge_core.hub.card import launch_line, model_card
from specforge_core.manifest_sections import Eagle3Config, PublishConfig, ServingConfig, TargetConfig
from specforge_core.stages import ResolvedTarget
from tests import made_build
from tests.made_build import REVISION, measurement, result


def report(
    root: Path, benchmark: BenchmarkResult | None = None, target: ResolvedTarget = made_build.TARGET, **entry: object
) -> EntryReport:
    artifacts = made_build.artifacts(root, benchmark)
    return make_report(made_build.entry(**entry), target, artifacts, failures=())


def test_metadata_reads_back_with_a_result_for_every_suite_and_metric(tmp_path: Path) -> None:
    benchmark = result(measurement("math"), measurement("code", num_output_tokens=250, speedup=1.75))
    data = ModelCard(model_card(report(tmp_path, benchmark), license_files=[])).data
    assert data.base_model == "meta-llama/Llama-3.1-8B-Instruct"
    assert data.base_model_relation == "adapter"
    assert data.license == "llama3.1"
    assert data.library_name == "sglang"
    assert {"eagle3", "speculative-decoding"} <= set(data.tags)
    assert data.model_name == "specbundle/llama-eagle3"
    values = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert values == {
        ("math", "acceptance_length"): 3.0,
        ("math", "speedup"): 2.0,
        ("code", "acceptance_length"): 2.5,
        ("code", "speedup"): 1.75,
    }


def test_a_target_that_is_no_hub_model_is_no_base_model(tmp_path: Path) -> None:
    local = ResolvedTarget(model="/models/mine", content_id="c0ffee")
    text = model_card(report(tmp_path, target=local), license_files=[])
    assert ModelCard(text).data.base_model is None
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


def test_the_measured_numbers_are_in_the_text(tmp_path: Path) -> None:
    text = model_card(report(tmp_path), license_files=[])
    # Medians 102 and 204 of the made-up repeats; 90, 70 and 40 of 100 steps.
    assert "| math | 3-1-4 | 1 | 10 | 3.00 | 1.25 | 102 | 204 | 2.00x (1.90 to 2.10) | 9 / 1 / 0 |" in text
    assert "| math | 3-1-4 | 90.0% | 70.0% | 40.0% |" in text
    assert "No GPU; Made-up CPU 9000, 4 threads; torch 2.13.0, transformers 5.23.0; commit 0123abc." in text
    assert "768 (3 failed, 5 cut off)" in text
    assert "150 steps, 300,000 tokens, 90 s on 2 x Made-up GPU" in text
    assert "1,000 of 4,096 tokens, 98.76% of what the target wrote" in text
    assert REVISION in text
    assert "key-train" in text


def test_numbers_of_the_in_process_engine_are_not_passed_off_as_a_servers(tmp_path: Path) -> None:
    served = result(measurement())
    environment = served.environment.model_copy(update={"versions": {"sglang": "0.5.14"}})
    served = served.model_copy(update={"environment": environment})
    note = "The engine is SpecBundle's own decoder"
    assert note in model_card(report(tmp_path / "a"), license_files=[])
    assert note not in model_card(report(tmp_path / "b", served), license_files=[])


def test_the_launch_line_is_what_was_measured() -> None:
    entry = made_build.entry(target=TargetConfig(model="org/target", trust_remote_code=True))
    serving = ServingConfig(num_steps=5, num_draft_tokens=6)
    assert launch_line(entry, serving, revision="0123abc").replace("\\\n ", "").split() == [
        *("python3", "-m", "sglang.launch_server", "--model-path", "org/target", "--revision", "0123abc"),
        *("--dtype", "bfloat16", "--speculative-algorithm", "EAGLE3"),
        *("--speculative-draft-model-path", "specbundle/llama-eagle3", "--speculative-num-steps", "5"),
        *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "6", "--trust-remote-code"),
    ]


def test_a_local_target_is_launched_by_its_path_and_never_in_float32() -> None:
    entry = made_build.entry(
        target=TargetConfig(model="/models/my target", dtype="float32"), publish=PublishConfig(repository=None)
    )
    line = launch_line(entry, ServingConfig(), revision=None)
    assert "--model-path '/models/my target' \\" in line
    assert "--dtype bfloat16" in line
    assert "--speculative-draft-model-path . \\" in line
    assert "--revision" not in line
    assert "--trust-remote-code" not in line


def test_each_measured_chain_has_one_launch_line(tmp_path: Path) -> None:
    long = ServingConfig(num_steps=7, num_draft_tokens=8)
    busy = ServingConfig(concurrency=8)
    benchmark = result(measurement(), measurement(serving=busy), measurement("code"), measurement(serving=long))
    text = model_card(report(tmp_path, benchmark), license_files=[])
    assert text.count("python3 -m sglang.launch_server") == 2
    assert "Chain 3-1-4, measured at concurrency 1, 8:" in text
    assert "Chain 7-1-8, measured at concurrency 1:" in text


def test_only_both_flags_make_it_eagle_3_1(tmp_path: Path) -> None:
    half = report(tmp_path / "a", draft=Eagle3Config(fc_norm=True))
    whole = report(tmp_path / "b", draft=Eagle3Config(fc_norm=True, norm_output=True))
    assert "\nEAGLE-3 draft model" in model_card(half, license_files=[])
    assert "\nEAGLE-3.1 draft model" in model_card(whole, license_files=[])


@pytest.mark.parametrize("license_files", [[], ["base_model/LICENSE"]])
def test_no_placeholder_is_left(tmp_path: Path, license_files: list[str]) -> None:
    text = model_card(report(tmp_path), license_files=license_files)
    for leftover in ("{{", "}}", "{%", "None", "Undefined"):
        assert leftover not in text
    assert "\n\n\n" not in text
