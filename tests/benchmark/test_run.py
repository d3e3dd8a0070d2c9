import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specforge_core.benchmark import run as stage
from specforge_core.benchmark.recording import REQUESTS_NAME, RESULT_NAME
from specforge_core.data.conversations import Conversation, write_conversations
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.facts import BenchmarkResult
from specforge_core.manifest_sections import Eagle3Config, ServingConfig
from specforge_core.stages import BenchmarkSpec, ResolvedBenchmark, ResolvedSource, ResolvedSuite
from specforge_core.targets.hf import HFTarget

SERVING = (ServingConfig(), ServingConfig(num_steps=2, num_draft_tokens=3, concurrency=2))


def write_draft(directory: Path, target: HFTarget) -> Path:
    torch.manual_seed(3)
    draft = Eagle3Draft.create(
        Eagle3Config(),
        target.config.to_dict(),
        target.load_target_head(),
        torch.arange(200),
        Eagle3Draft.capture_layers(None, target.num_layers),
    )
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(draft.serving_config()))
    save_file(
        {n: t.bfloat16() if t.is_floating_point() else t for n, t in draft.serving_state_dict().items()},
        directory / "model.safetensors",
    )
    return directory


@pytest.fixture(scope="module")
def spec(talkative_target, tmp_path_factory) -> BenchmarkSpec:
    root = tmp_path_factory.mktemp("benchmark")
    target = HFTarget(talkative_target, device="cpu")
    (root / "conversations").mkdir()
    conversation = Conversation("c", "test", (), tuple(range(40)), (False,) * 10 + (True,) * 30, ("stop",))
    write_conversations(root / "conversations", [conversation])
    suites = tuple(
        ResolvedSuite(
            name=family,
            source=ResolvedSource(dataset="builtin:demo", config=family, split="heldout", limit=2, content_id="x"),
            max_new_tokens=16,
        )
        for family in ("arithmetic", "followup")
    )
    return BenchmarkSpec(
        target=talkative_target,
        draft=write_draft(root / "draft", target),
        conversations=root / "conversations",
        benchmark=ResolvedBenchmark(suites=suites, serving=SERVING, repeats=2),
        hardware="test",
    )


def test_the_stage_measures_every_suite_at_every_configuration(spec, tmp_path):
    num_threads = torch.get_num_threads()
    result = stage.main(spec, tmp_path)
    assert torch.get_num_threads() == num_threads
    assert BenchmarkResult.model_validate_json((tmp_path / RESULT_NAME).read_text()) == result
    assert [(m.suite, m.serving) for m in result.measurements] == [
        (family, serving) for family in ("arithmetic", "followup") for serving in SERVING
    ]
    records = [json.loads(line) for line in (tmp_path / REQUESTS_NAME).read_text().splitlines()]
    assert len(records) == 4 * 2 * 3, "4 measurements, 2 prompts; without draft, with it, with n-grams"
    for measurement in result.measurements:
        assert measurement.lossless.num_different == 0
        assert measurement.num_prompts == 2
        assert measurement.speedup_low <= measurement.speedup <= measurement.speedup_high
        own = [
            record
            for record in records
            if record["suite"] == measurement.suite
            and record["concurrency"] == measurement.serving.concurrency
            and record["drafter"] == "draft"
        ]
        assert measurement.num_output_tokens == sum(record["num_output_tokens"] for record in own)
        assert measurement.num_verify_steps == sum(record["num_verify_steps"] for record in own)
        # One token of a prompt comes from its prefill; the last step may be cut before the target's own token.
        emitted_by_steps = measurement.num_output_tokens - 2 - sum(measurement.accepted_by_position)
        assert measurement.num_verify_steps - 2 <= emitted_by_steps <= measurement.num_verify_steps
    assert result.environment.gpu is None
    assert set(result.environment.versions) == {"specbundle", "torch", "transformers"}


def test_a_draft_of_another_target_is_refused(spec, tiny_target, tmp_path):
    config = json.loads((spec.draft / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    (other / "model.safetensors").write_bytes((spec.draft / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="vocab_size=1000"):
        stage.main(spec.model_copy(update={"draft": other}), tmp_path)
