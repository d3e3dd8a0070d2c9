"""The server of the tests is itself right: what its clients are tested with holds together."""

import contextlib
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from specforge_core.benchmark.server import Launch, running_servers, server_info
from specforge_core.benchmark.server_flags import Options, draft_options
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.manifest_sections import Eagle3Config, ServingConfig
from specforge_core.stages import ResolvedTarget
from specforge_core.targets.hf import HFTarget
from tests.sglang_like import MODULE, Behaviour

DRAFT = draft_options(Path("draft"), ServingConfig())
PROMPTS = [[1, 2, 3], [4], [5, 6] * 20]


@contextlib.contextmanager
def served(directory: Path, options: Options, behaviour: Behaviour | None = None) -> Iterator[str]:
    launch = Launch(
        python=sys.executable,
        module=MODULE,
        options={"--model-path": "scripted", **options},
        environment=dict([(behaviour or Behaviour()).variable()]),
        startup_timeout_s=60,
    )
    with running_servers(launch, name="test", gpu_groups=[()], directory=directory) as (server,):
        yield server.url


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def greedy(num_tokens: int, **more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": num_tokens, **more}


def check_figures(meta_info: dict[str, Any], num_draft_tokens: int) -> None:
    """The draft's figures agree with each other and with the tokens."""
    histogram, num_steps = meta_info["spec_correct_drafts_histogram"], meta_info["spec_verify_ct"]
    num_correct = sum(k * count for k, count in enumerate(histogram))
    assert (sum(histogram), meta_info["spec_num_correct_drafts"]) == (num_steps, num_correct)
    assert meta_info["spec_num_proposed_drafts"] == num_steps * (num_draft_tokens - 1)
    assert meta_info["spec_accept_length"] == meta_info["completion_tokens"] / num_steps
    # The first token comes from the prefill; the last step may be cut off.
    assert 0 <= 1 + num_steps + num_correct - meta_info["completion_tokens"] < num_draft_tokens


def test_a_scripted_answer_depends_on_the_prefix_alone(tmp_path: Path) -> None:
    with served(tmp_path, {}) as url:
        whole = post(url, {"input_ids": [1, 2, 3], "sampling_params": greedy(12, ignore_eos=True)})["output_ids"]
        assert len(whole) == 12
        body = {"input_ids": [1, 2, 3, *whole[:5]], "sampling_params": greedy(7, ignore_eos=True)}
        assert post(url, body)["output_ids"] == whole[5:]


def test_answers_end_by_themselves_or_at_their_limit(tmp_path: Path) -> None:
    with served(tmp_path, {}) as url:
        answers = post(url, {"input_ids": PROMPTS, "rid": ["a", "b", "c"], "sampling_params": greedy(500)})
        assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b", "c"]
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            ids, meta_info = answer["output_ids"], answer["meta_info"]
            assert meta_info["finish_reason"] == {"type": "stop", "matched": 0}
            assert ids.index(0) == len(ids) - 1
            assert (meta_info["prompt_tokens"], meta_info["completion_tokens"]) == (len(prompt), len(ids))
            assert "spec_verify_ct" not in meta_info
        cut = post(url, {"input_ids": PROMPTS[0], "sampling_params": greedy(2)})
        assert cut["output_ids"] == answers[0]["output_ids"][:2]
        assert cut["meta_info"]["finish_reason"] == {"type": "length", "length": 2}


def test_a_scripted_draft_changes_no_answer_and_saves_time(tmp_path: Path) -> None:
    slow = Behaviour(step_delay_s=0.01)
    body = {"input_ids": PROMPTS[0], "sampling_params": greedy(40, ignore_eos=True)}
    with served(tmp_path, {}, slow) as base_url, served(tmp_path, DRAFT, slow) as draft_url:
        base, drafted = post(base_url, body), post(draft_url, body)
    assert drafted["output_ids"] == base["output_ids"]
    check_figures(drafted["meta_info"], num_draft_tokens=4)
    assert base["meta_info"]["e2e_latency"] >= 40 * 0.01
    assert drafted["meta_info"]["e2e_latency"] < 0.8 * base["meta_info"]["e2e_latency"]


def test_faults_come_when_they_are_asked_for(tmp_path: Path) -> None:
    body = {"input_ids": [1], "sampling_params": greedy(1)}
    with served(tmp_path, {}, Behaviour(fail_every=2, drop_every=3)) as url:
        post(url, body)
        with pytest.raises(urllib.error.HTTPError, match="500"):
            post(url, body)
        with pytest.raises(ConnectionError):
            post(url, body)


@pytest.mark.parametrize(
    ("input_ids", "words"),
    [([], "vocabulary of 256"), ([256], "vocabulary of 256"), ([1] * 4096, "longer than the model's context length")],
)
def test_bad_requests_are_refused_with_status_400(tmp_path: Path, input_ids: list[int], words: str) -> None:
    with served(tmp_path, {}) as url:
        with pytest.raises(urllib.error.HTTPError, match="400") as caught:
            post(url, {"input_ids": input_ids})
        assert words in json.load(caught.value)["error"]["message"]
        assert server_info(url)["internal_states"][0]["num_requests"] == 1


@pytest.mark.slow
def test_the_target_of_a_folder_answers_as_transformers_does_with_a_draft_too(
    tmp_path: Path, tiny_target: ResolvedTarget
) -> None:
    target = HFTarget(tiny_target, device="cpu")
    torch.manual_seed(7)
    draft = Eagle3Draft.create(
        Eagle3Config(num_steps=3, draft_vocab_size=130),
        target.config.to_dict(),
        target.load_target_head(),
        torch.arange(0, 260, 2).clamp(max=258),
        Eagle3Draft.capture_layers(None, target.num_layers),
    )
    (tmp_path / "config.json").write_text(json.dumps(draft.serving_config()))
    save_file(draft.serving_state_dict(), tmp_path / "model.safetensors")
    expected = target.model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=20, do_sample=False)[0, 3:].tolist()
    options = {
        "--model-path": tiny_target.model,
        "--dtype": "float32",
        **draft_options(tmp_path, ServingConfig()),
    }
    with served(tmp_path, options, Behaviour(answers="model")) as url:
        answer = post(url, {"input_ids": PROMPTS[0], "sampling_params": greedy(20)})
    assert answer["output_ids"] == expected
    check_figures(answer["meta_info"], num_draft_tokens=4)
