"""The card says what was measured, in a form that the Hub's own library reads back."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from specforge_core.benchmark.report import EntryReport, make_report
from specforge_core.facts import BenchmarkResult
from specforge_core.hub.card import model_card
from specforge_core.manifest_publish import PublishConfig
from specforge_core.manifest_sections import Eagle3Config, EngineConfig, ServingConfig, TargetConfig
from specforge_core.stages import ResolvedTarget
from tests import made_build
from tests.made_build import REVISION, chain, measurement, result, served_result


def words(card: str) -> list[list[str]]:
    """Every launch line of a card, as a shell reads it."""
    lines = re.findall(r"```bash\n(.*?)\n```", card, flags=re.DOTALL)
    return [shlex.split(line.replace("\\\n", "")) for line in lines]


def report(
    root: Path, benchmark: BenchmarkResult | None = None, target: ResolvedTarget = made_build.TARGET, **entry: object
) -> EntryReport:
    artifacts = made_build.artifacts(root, benchmark)
    config = TargetConfig(**target.model_dump(exclude={"content_id"}))
    return make_report(made_build.entry(target=config, **entry), target, artifacts, failures=())


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
    note = "The engine is SpecBundle's own decoder"
    assert note in model_card(report(tmp_path / "a"), license_files=[])
    assert note not in model_card(report(tmp_path / "b", served_result(measurement())), license_files=[])


def test_the_launch_line_serves_this_draft_with_the_target_that_was_measured(tmp_path: Path) -> None:
    text = model_card(report(tmp_path, result(measurement(serving=chain(5, 1, 6)))), license_files=[])
    assert words(text) == [
        [
            *("python3", "-m", "sglang.launch_server", "--model-path", "meta-llama/Llama-3.1-8B-Instruct"),
            *("--revision", REVISION, "--dtype", "bfloat16", "--tp-size", "1", "--speculative-algorithm", "EAGLE3"),
            *("--speculative-draft-model-path", "specbundle/llama-eagle3", "--speculative-num-steps", "5"),
            *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "6"),
        ]
    ]


def test_a_local_target_is_launched_by_its_path_and_never_in_float32(tmp_path: Path) -> None:
    local = ResolvedTarget(model="/models/my target", dtype="float32", trust_remote_code=True, content_id="c0ffee")
    made = report(
        tmp_path,
        target=local,
        engine=EngineConfig(name="transformers"),
        # Nowhere to download it from: the command is for whoever stands in the draft's folder.
        publish=PublishConfig(repository=None),
    )
    (line,) = words(model_card(made, license_files=[]))
    assert line[line.index("--model-path") + 1] == "/models/my target"
    assert line[line.index("--dtype") + 1] == "bfloat16"
    assert line[line.index("--speculative-draft-model-path") + 1] == "."
    assert "--trust-remote-code" in line
    assert "--revision" not in line


def test_each_measured_chain_has_one_launch_line(tmp_path: Path) -> None:
    long, busy = chain(7, 1, 8), ServingConfig(concurrency=8)
    benchmark = result(measurement(), measurement(serving=busy), measurement("code"), measurement(serving=long))
    text = model_card(report(tmp_path, benchmark), license_files=[])
    assert len(words(text)) == 2
    assert "Chain 3-1-4, measured at concurrency 1, 8:" in text
    assert "Chain 7-1-8, measured at concurrency 1:" in text
    assert "Only chains (top-k 1) were measured" in text
    assert "At which load" not in text


def test_a_sweep_gives_a_launch_line_for_each_load_and_says_where_to_switch_off(tmp_path: Path) -> None:
    text = model_card(report(tmp_path, served_result(measurement())), license_files=[])
    alone, busy, off = words(text)
    assert [line[line.index("--speculative-num-steps") + 1] for line in (alone, busy)] == ["7", "2"]
    assert not [word for word in off if word.startswith("--speculative")]
    assert "At 16 to 32 requests at once, without draft:" in text
    assert "Switch speculation off from 16 requests at once" in text
    assert "| 8 | 1,130 | **1,470** (1.30x, 2.70) |" in text
    assert "Only chains (top-k 1) were measured" not in text


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
