"""A target behind a server answers as the same target in this process does."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from specforge_core.benchmark.server import Launch, SupervisedServer, running_servers
from specforge_core.stages import ResolvedTarget
from specforge_core.targets import Completion, GenerationRequest, Refusal, Sampling
from specforge_core.targets.hf import HFTarget
from specforge_core.targets.sglang import SGLangTarget, num_in_flight
from tests import tiny
from tests.sglang_like import MODULE, Behaviour


@contextlib.contextmanager
def serving(
    target: ResolvedTarget, directory: Path, *, answers: str = "model"
) -> Iterator[tuple[SupervisedServer, ...]]:
    launch = Launch(
        python=sys.executable,
        module=MODULE,
        options={"--model-path": target.model, "--dtype": target.dtype},
        environment=dict([Behaviour(answers=answers).variable()]),
        startup_timeout_s=60,
    )
    with running_servers(launch, name="test", gpu_groups=[()], directory=directory) as servers:
        yield servers


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> ResolvedTarget:
    return tiny.resolved(tiny.make_talkative_target(tmp_path_factory.mktemp("talkative")))


@pytest.mark.slow
def test_greedy_answers_are_those_of_the_target_in_process(talkative: ResolvedTarget, tmp_path: Path) -> None:
    # The target's context has 512 tokens: the last prompts leave room for 12 and 1.
    prompts = [[i, 2 * i, 3] for i in range(12)] + [[7] * 500, [7] * 511]
    requests = [GenerationRequest(f"{i}/0", prompt) for i, prompt in enumerate(prompts)]
    sampling = Sampling(max_new_tokens=30)
    expected = set(HFTarget(talkative, device="cpu").generate(requests, sampling, batch_size=1))
    with serving(talkative, tmp_path) as servers:
        target = SGLangTarget(talkative, servers)
        assert set(target.generate(iter(requests), sampling, batch_size=4)) == expected
    reasons = [completion.finish_reason for completion in expected]
    assert min(reasons.count("stop"), reasons.count("length")) >= 2


def test_a_prompt_that_leaves_no_room_is_refused_alone(talkative: ResolvedTarget, tmp_path: Path) -> None:
    requests = [GenerationRequest(f"{length}/0", [5] * length) for length in (3, 512, 4)]
    with serving(talkative, tmp_path, answers="scripted") as servers:
        target = SGLangTarget(talkative, servers)
        outcomes = {outcome.id: outcome for outcome in target.generate(requests, Sampling(4), batch_size=1)}
    refused = outcomes.pop("512/0")
    assert isinstance(refused, Refusal)
    assert "512 tokens" in refused.reason
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    assert set(outcomes) == {"3/0", "4/0"}


def test_the_same_tokens_end_an_answer_as_in_process(talkative: ResolvedTarget, tmp_path: Path) -> None:
    assert SGLangTarget(talkative, []).eos_token_ids == HFTarget(talkative, device="cpu").eos_token_ids
    # Neither a generation config nor weights: an end-of-turn token by the config and the tokenizer.
    bare = tmp_path / "bare"
    shutil.copytree(talkative.model, bare, ignore=shutil.ignore_patterns("generation_config.json", "*.safetensors"))
    end_id = tiny.make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert SGLangTarget(tiny.resolved(bare), []).eos_token_ids == {end_id}


def test_servers_get_a_little_more_than_they_can_decode_at_once() -> None:
    assert [num_in_flight(64, 1), num_in_flight(64, 2), num_in_flight(4, 1)] == [72, 144, 5]
