import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.benchmark.suites import Interlocutor, load_references, load_requests, longest_request
from specforge_core.data.prompts import load_prompts
from specforge_core.manifest_sections import AnswerConfig
from specforge_core.stages import ResolvedSource, ResolvedSuite
from specforge_core.targets.hf import HFTarget

MAX_NEW_TOKENS = 40


def suite(directory: Path, rows: list[dict[str, Any]], answer: AnswerConfig | None = None) -> ResolvedSuite:
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ResolvedSource(dataset=str(path), content_id="test")
    return ResolvedSuite(name="suite", source=source, max_new_tokens=MAX_NEW_TOKENS, answer=answer)


@pytest.fixture(scope="module")
def target(talkative_target) -> HFTarget:
    return HFTarget(talkative_target, device="cpu")


@pytest.fixture(scope="module")
def interlocutor(target) -> Interlocutor:
    return Interlocutor(
        target.tokenizer,
        target.config.max_position_embeddings,
        lambda requests, sampling: target.generate(requests, sampling, batch_size=3),
    )


def test_single_questions_are_asked_as_the_template_writes_them(interlocutor, target, tmp_path):
    asked = suite(tmp_path, [{"prompt": "What is 2 + 2?"}, {"prompt": "And 3 + 3?"}])
    requests = load_requests(asked, interlocutor)
    for request, prompt in zip(requests, load_prompts(asked.source), strict=True):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in prompt.messages)
        assert target.tokenizer.decode(request.input_ids) == text + "<|im_start|>assistant\n"


def test_the_last_question_follows_the_targets_own_greedy_answers(interlocutor, target, tmp_path):
    asked = suite(tmp_path, [{"turns": [f"{chr(65 + i)}?", "Why?", "And then?"]} for i in range(8)])
    requests = load_requests(asked, interlocutor)
    num_turns = Counter()
    for request, prompt in zip(requests, load_prompts(asked.source), strict=True):
        ids: list[int] = []
        text = ""
        for message in prompt.messages:
            text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>"
            if message["role"] != "user":
                continue
            num_turns[prompt.id] += 1
            ids += target.tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
            reached = list(ids)
            answer = target.model.generate(torch.tensor([ids]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            ids = answer[0].tolist()
            text = ""
            if ids[-1] != target.tokenizer.eos_token_id:
                break
        assert list(request.input_ids) == reached
    assert len(set(num_turns.values())) > 1, "some conversations must get further than others"


def test_equal_prompts_are_asked_once(interlocutor, tmp_path):
    asked = suite(tmp_path, [{"prompt": "a?"}, {"prompt": "b?"}, {"prompt": "a?"}])
    assert len(load_requests(asked, interlocutor)) == 2


def test_a_prompt_that_leaves_no_room_is_left_out_and_a_suite_of_such_is_refused(interlocutor, target, tmp_path):
    long = {"prompt": "long " * 200}
    (request,) = load_requests(suite(tmp_path, [long, {"prompt": "short?"}]), interlocutor)
    assert "short?" in target.tokenizer.decode(request.input_ids)
    with pytest.raises(ValueError, match="suite suite: none of the 1 prompts"):
        load_requests(suite(tmp_path, [long]), interlocutor)


def test_references_are_found_by_the_ids_of_the_requests(interlocutor, tmp_path):
    rows = [
        {"turns": ["2 + 2?"], "answer": "As 2 + 2 = 4:\n#### 4"},
        {"turns": ["3 + 3?", "And twice that?"], "answer": "12"},
        {"turns": ["pi?"], "answer": None},
    ]
    asked = suite(tmp_path, rows, AnswerConfig(kind="number", column="answer"))
    single, *_ = load_requests(asked, interlocutor)
    assert load_references(asked) == {single.id: "As 2 + 2 = 4:\n#### 4"}
    assert load_references(suite(tmp_path, rows)) == {}


def test_a_suite_whose_answers_cannot_be_checked_is_refused(tmp_path):
    answer = AnswerConfig(kind="number", column="answer")
    with pytest.raises(ValueError, match="suite suite: 'four' is no reference answer of kind 'number'"):
        load_references(suite(tmp_path, [{"prompt": "2 + 2?", "answer": "four"}], answer))
    with pytest.raises(ValueError, match="suite suite: no prompt of one question has an answer in the column 'answer'"):
        load_references(suite(tmp_path, [{"turns": ["1?", "2?"], "answer": "4"}], answer))
    with pytest.raises(ValueError, match="the answer's column='answer' is not there; it has prompt, reply"):
        load_references(suite(tmp_path, [{"prompt": "2 + 2?", "reply": "4"}], answer))


def test_no_request_with_its_answer_is_longer_than_was_foretold(interlocutor, target, tmp_path):
    asked = suite(tmp_path, [{"turns": ["a?" * 20, "b?", "c?"]}, {"prompt": "short?"}])
    longest = longest_request(asked, target.tokenizer, 10_000)
    requests = load_requests(asked, interlocutor)
    assert max(len(request.input_ids) for request in requests) + MAX_NEW_TOKENS <= longest
    assert longest_request(asked, target.tokenizer, 50) == 50
