import pytest
import torch

from specforge_core.benchmark.suites import load_requests
from specforge_core.data.prompts import load_prompts
from specforge_core.stages import ResolvedSource, ResolvedSuite
from specforge_core.targets.hf import HFTarget

MAX_NEW_TOKENS = 40


def suite(family: str, *, limit: int) -> ResolvedSuite:
    source = ResolvedSource(dataset="builtin:demo", config=family, split="heldout", limit=limit, content_id="test")
    return ResolvedSuite(name=family, source=source, max_new_tokens=MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def target(talkative_target) -> HFTarget:
    return HFTarget(talkative_target, device="cpu")


def test_single_questions_are_asked_as_the_template_writes_them(target):
    asked = suite("arithmetic", limit=3)
    requests = load_requests(asked, target, batch_size=4)
    for request, prompt in zip(requests, load_prompts(asked.source), strict=True):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in prompt.messages)
        assert target.tokenizer.decode(request.input_ids) == text + "<|im_start|>assistant\n"


def test_the_last_question_follows_the_targets_own_greedy_answers(target):
    asked = suite("followup", limit=6)
    requests = load_requests(asked, target, batch_size=3)
    num_continued = 0
    for request, prompt in zip(requests, load_prompts(asked.source), strict=True):
        ids: list[int] = []
        text = ""
        for message in prompt.messages:
            text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>"
            if message["role"] != "user":
                continue
            ids += target.tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
            reached = list(ids)
            answer = target.model.generate(torch.tensor([ids]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            ids = answer[0].tolist()
            text = ""
            if ids[-1] != target.tokenizer.eos_token_id:
                break
            num_continued += message is not prompt.messages[-1]
        assert list(request.input_ids) == reached
    assert 0 < num_continued < 6, "some conversations must go on and some must not"


def test_equal_prompts_are_asked_once(target, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a?"}\n{"prompt": "b?"}\n{"prompt": "a?"}\n')
    source = ResolvedSource(dataset=str(path), content_id="test")
    assert len(load_requests(ResolvedSuite(name="twice", source=source), target, batch_size=4)) == 2


def test_a_suite_without_an_askable_prompt_is_refused(target, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "%s"}\n' % ("long " * 200))
    source = ResolvedSource(dataset=str(path), content_id="test")
    with pytest.raises(ValueError, match="suite too-long: none of the 1 prompts"):
        load_requests(ResolvedSuite(name="too-long", source=source), target, batch_size=4)
