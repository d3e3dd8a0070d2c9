"""The card says what was measured, in a form that the Hub's own library reads back."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from specforge_core.benchmark.report import EntryReport, make_report
from specforge_core.facts import BenchmarkResult, PromptSums
from specforge_core.hub.card import model_card, num_gpus
from specforge_core.manifest_publish import PublishConfig
from specforge_core.manifest_sections import (
    BenchmarkConfig,
    DataConfig,
    Eagle3Config,
    EngineConfig,
    PromptSource,
    ServingConfig,
    SuiteConfig,
    TargetConfig,
)
from specforge_core.stages import ResolvedTarget
from tests import made_build
from tests.made_build import REVISION, chain, measurement, result, served_result

FILES = ("config.json", "model.safetensors", "speculators/config.json", "speculators/model.safetensors")


def words(card: str, section: str = "### SGLang") -> list[list[str]]:
    """Every command in a section of a card, as a shell reads it."""
    text = re.split(r"\n##+ ", card.split(f"\n{section}\n")[1])[0]
    blocks = re.findall(r"```bash\n(.*?)\n```", text, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", "").splitlines()]


def report(
    root: Path, measured: BenchmarkResult | None = None, target: ResolvedTarget = made_build.TARGET, **entry: object
) -> EntryReport:
    artifacts = made_build.artifacts(root, measured)
    config = TargetConfig(**target.model_dump(exclude={"content_id"}))
    return make_report(made_build.entry(target=config, **entry), target, artifacts, failures=())


def test_metadata_reads_back_with_a_result_for_every_suite_and_metric(tmp_path: Path) -> None:
    benchmark = result(measurement("math"), measurement("code", num_output_tokens=250, speedup=1.75))
    data = ModelCard(model_card(report(tmp_path, benchmark), FILES)).data
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
    text = model_card(report(tmp_path, target=local), FILES)
    assert ModelCard(text).data.base_model is None
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


def test_the_measured_numbers_are_in_the_text(tmp_path: Path) -> None:
    text = model_card(report(tmp_path), FILES)
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
    assert note in model_card(report(tmp_path / "a"), FILES)
    assert note not in model_card(report(tmp_path / "b", served_result(measurement())), FILES)


def test_the_launch_line_serves_this_draft_with_the_target_that_was_measured(tmp_path: Path) -> None:
    text = model_card(report(tmp_path, result(measurement(serving=chain(5, 1, 6)))), FILES)
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
    text = model_card(made, FILES, target_path="/home/me/my target")
    (line,) = words(text)
    assert line[line.index("--model-path") + 1] == "/home/me/my target"
    assert line[line.index("--dtype") + 1] == "bfloat16"
    assert line[line.index("--speculative-draft-model-path") + 1] == "."
    assert "--trust-remote-code" in line
    assert "--revision" not in line
    (serve,) = words(text, "### vLLM")
    assert serve[2:6] == ["/home/me/my target", "--trust-remote-code", "--dtype", "bfloat16"]
    assert json.loads(serve[-1])["model"] == "./speculators"


def test_a_local_target_of_a_repository_keeps_the_path_that_its_manifest_says(tmp_path: Path) -> None:
    local = ResolvedTarget(model="models/mine", content_id="c0ffee")
    text = model_card(report(tmp_path, target=local), FILES, target_path="/home/me/models/mine")
    (line,) = words(text)
    assert line[line.index("--model-path") + 1] == "models/mine"
    assert "shell in the folder that `models/mine` is relative to" in text
    assert "/home/me" not in text


def test_each_measured_chain_has_one_launch_line(tmp_path: Path) -> None:
    long, busy = chain(7, 1, 8), ServingConfig(concurrency=8)
    benchmark = result(measurement(), measurement(serving=busy), measurement("code"), measurement(serving=long))
    text = model_card(report(tmp_path, benchmark), FILES)
    assert len(words(text)) == 2
    assert "Chain 3-1-4, measured at concurrency 1, 8:" in text
    assert "Chain 7-1-8, measured at concurrency 1:" in text
    assert "Only chains (top-k 1) were measured" in text
    assert "At which load" not in text


def test_a_sweep_gives_a_launch_line_for_each_load_and_says_where_to_switch_off(tmp_path: Path) -> None:
    text = model_card(report(tmp_path, served_result(measurement())), FILES)
    alone, busy, off = words(text)
    assert [line[line.index("--speculative-num-steps") + 1] for line in (alone, busy)] == ["7", "2"]
    assert not [word for word in off if word.startswith("--speculative")]
    assert "At 16 to 32 requests at once, without draft:" in text
    assert "Switch speculation off from 16 requests at once" in text
    assert "| 8 | 1,130 (1,120 to 1,140) | **1,470** / 1,130 = 1.30x (2.70) |" in text
    assert "Only chains (top-k 1) were measured" not in text


def test_only_both_flags_make_it_eagle_3_1(tmp_path: Path) -> None:
    half = report(tmp_path / "a", draft=Eagle3Config(fc_norm=True))
    whole = report(tmp_path / "b", draft=Eagle3Config(fc_norm=True, norm_output=True))
    assert "\nEAGLE-3 draft model" in model_card(half, FILES)
    assert "\nEAGLE-3.1 draft model" in model_card(whole, FILES)


def test_metadata_has_the_intervals_where_they_are_known(tmp_path: Path) -> None:
    # Two prompts of equal ratio: 3 tokens a step, no spread.
    sums = PromptSums(ids_digest="ab", num_output_tokens=(150, 150), num_verify_steps=(50, 50))
    text = model_card(report(tmp_path, result(measurement("math", prompts=sums), measurement("code"))), FILES)
    found = {(r.dataset_name, r.metric_type): r.metric_args for r in ModelCard(text).data.eval_results}
    assert found == {
        ("math", "acceptance_length"): {"interval_95": [3.0, 3.0]},
        ("math", "speedup"): {"interval_95": [1.9, 2.1]},
        ("code", "acceptance_length"): None,
        ("code", "speedup"): {"interval_95": [1.9, 2.1]},
    }


def test_a_gain_that_is_not_shown_is_not_claimed(tmp_path: Path) -> None:
    unsure = measurement("code", speedup_low=0.75)
    assert "**No gain is shown on code:**" in model_card(report(tmp_path / "a", result(measurement(), unsure)), FILES)
    assert "No gain is shown" not in model_card(report(tmp_path / "b", result(measurement())), FILES)


def test_figures_of_text_that_a_program_wrote_say_so(tmp_path: Path) -> None:
    note = "far more predictable than people's"
    assert note in model_card(report(tmp_path / "a"), FILES)
    source = PromptSource(dataset="org/questions", revision=REVISION)
    suites = (SuiteConfig(name="math", source=source),)
    real = report(tmp_path / "b", benchmark=BenchmarkConfig(suites=suites))
    assert note not in model_card(real, FILES)


def test_a_card_without_a_caveat_has_no_gap_in_its_place(tmp_path: Path) -> None:
    suites = (SuiteConfig(name="math", source=PromptSource(dataset="org/questions", revision=REVISION)),)
    made = report(tmp_path, served_result(measurement()), benchmark=BenchmarkConfig(suites=suites))
    text = model_card(made, FILES)
    assert "The target computed in bfloat16.\n\n### At which load" in text
    assert "\n\n\n" not in text


def test_data_sets_of_the_hub_are_linked(tmp_path: Path) -> None:
    sources = (PromptSource(dataset="org/chats", revision=REVISION, limit=1000), PromptSource(dataset="mine/a.jsonl"))
    publish = PublishConfig(to="hub", repository="specbundle/llama-eagle3", dataset="specbundle/llama-conversations")
    made = report(tmp_path, data=DataConfig(sources=sources), publish=publish)
    text = model_card(made, FILES)
    assert ModelCard(text).data.datasets == ["org/chats", "specbundle/llama-conversations"]
    assert f"| `org/chats` | train | {REVISION} | 1,000 |" in text


def test_the_cost_is_told_by_stage_in_gpu_hours(tmp_path: Path) -> None:
    # 90 s on 2 GPUs are 0.05 GPU hours, six times.
    text = model_card(report(tmp_path), FILES)
    assert "| train | 90 | 2 x Made-up GPU | 0.05 |" in text
    assert "| **all** | 540 |  | 0.30 |" in text


@pytest.mark.parametrize(
    ("hardware", "expected"), [("8 x NVIDIA H200", 8), ("16 x A", 16), ("AMD EPYC", 0), ("", 0), ("2x4 GPU", 0)]
)
def test_gpus_are_counted_from_the_name_of_the_hardware(hardware: str, expected: int) -> None:
    assert num_gpus(hardware) == expected


def test_plots_and_licences_that_are_there_are_shown(tmp_path: Path) -> None:
    made = report(tmp_path, served_result(measurement()))
    more = ("plots/speedup.png", "plots/acceptance.png", "plots/throughput.png", "LICENSE", "base_model/LICENSE")
    whole, bare = model_card(made, FILES + more), model_card(made, FILES)
    assert re.findall(r"!\[.*?\]\((.*?)\)", whole) == [
        "plots/speedup.png",
        "plots/throughput.png",
        "plots/acceptance.png",
    ]
    assert "llama3.1 ([LICENSE](LICENSE))" in whole
    assert whole.endswith("applies as well: [base_model/LICENSE](base_model/LICENSE).")
    assert ModelCard(whole).data.license_link == "LICENSE"
    assert "![" not in bare
    assert "llama3.1 (its text is not in this folder)" in bare
    assert ModelCard(bare).data.license_link is None


@pytest.mark.parametrize(
    ("flags", "version"), [({}, "0.20"), ({"fc_norm": True}, "0.25"), ({"fc_norm": True, "norm_output": True}, "0.25")]
)
def test_vllm_gets_the_folder_in_its_own_format(tmp_path: Path, flags: dict[str, bool], version: str) -> None:
    text = model_card(report(tmp_path, draft=Eagle3Config(**flags)), FILES)
    fetch, serve = words(text, "### vLLM")
    assert fetch == [
        *("hf", "download", "specbundle/llama-eagle3", "--include", "speculators/*", "--local-dir", "llama-eagle3")
    ]
    assert serve[:3] == ["vllm", "serve", "meta-llama/Llama-3.1-8B-Instruct"]
    options = dict(zip(serve[3::2], serve[4::2], strict=True))
    # Flags and keys as vLLM 0.33 knows them (engine/arg_utils.py, config/speculative.py).
    assert options.keys() == {"--revision", "--dtype", "--tensor-parallel-size", "--speculative-config"}
    assert json.loads(options["--speculative-config"]) == {
        "method": "eagle3",
        "model": "llama-eagle3/speculators",
        "num_speculative_tokens": 3,
    }
    assert f"for vLLM {version} or newer" in text
    assert ("leave the norms of EAGLE-3.1 out" in text) is bool(flags)
    assert {"vllm", "speculators"} <= set(ModelCard(text).data.tags)


def test_vllm_drafts_a_chain_even_where_a_tree_was_measured_first(tmp_path: Path) -> None:
    tree, long = measurement(serving=chain(5, 4, 16)), measurement(serving=chain(7, 1, 8))
    (_, serve) = words(model_card(report(tmp_path, result(tree, long)), FILES), "### vLLM")
    assert json.loads(serve[-1])["num_speculative_tokens"] == 7


def test_a_folder_without_vllms_format_has_no_command_for_it(tmp_path: Path) -> None:
    text = model_card(report(tmp_path), FILES[:2])
    assert "vLLM" not in text
    assert "vllm" not in ModelCard(text).data.tags


@pytest.mark.parametrize("more", [(), ("base_model/LICENSE", "LICENSE", "plots/speedup.png")])
def test_no_placeholder_is_left(tmp_path: Path, more: tuple[str, ...]) -> None:
    text = model_card(report(tmp_path), FILES + more)
    for leftover in ("{{", "}}", "{%", "None", "Undefined"):
        assert leftover not in text
    assert "\n\n\n" not in text
