import json
import time
from pathlib import Path
from typing import Any

import pytest

from specforge_core.artifacts import METRICS_NAME, PROGRESS_DIRECTORY, load_artifact, seal
from specforge_core.data import regenerate as stage
from specforge_core.data.conversations import conversation_shards, load_conversations
from specforge_core.data.journal import Exchange, Journal
from specforge_core.data.regenerate import JOURNAL_NAME, regenerate
from specforge_core.stages import RegenerateSpec, ResolvedTarget
from specforge_core.targets import Completion, GenerationRequest
from tests import tiny
from tests.data.interrupted_regenerate import answer as scripted_answer
from tests.data.interrupted_regenerate import regenerate_slowly
from tests.data.scripted_target import END, START, TOKENIZER, ScriptedTarget, make_spec, text_ids, write_rows
from tests.processes import start

SYSTEM = {"role": "system", "content": "be kind"}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return list(load_conversations(directory))


def shard_bytes(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in conversation_shards(directory)]


def journal_lines(directory: Path) -> list[dict[str, Any]]:
    text = (directory / PROGRESS_DIRECTORY / JOURNAL_NAME).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_mask_of_a_conversation_of_two_turns_is_true_just_where_the_target_spoke(tmp_path: Path) -> None:
    messages = [SYSTEM, user("hi"), {"role": "assistant", "content": "somebody else's"}, user("why?")]
    spec = make_spec(write_rows(tmp_path / "prompts.jsonl", [{"messages": messages}]))
    facts = regenerate(spec, ScriptedTarget({"hi": "yes", "why?": "no"}.__getitem__), TOKENIZER, tmp_path)
    [row] = rows_of(tmp_path)
    pieces = [
        (False, [START, *text_ids("system\nbe kind"), END, START, *text_ids("user\nhi"), END]),
        (False, [START, *text_ids("assistant\n")]),
        (True, [*text_ids("yes"), END]),
        (False, [START, *text_ids("user\nwhy?"), END, START, *text_ids("assistant\n")]),
        (True, [*text_ids("no"), END]),
    ]
    assert row["input_ids"] == [token for _, ids in pieces for token in ids]
    assert row["loss_mask"] == [is_answer for is_answer, ids in pieces for _ in ids]
    assert [message["content"] for message in row["messages"]] == ["be kind", "hi", "yes", "why?", "no"]
    assert row["finish_reasons"] == ["stop", "stop"]
    assert (facts.num_conversations, facts.num_loss_tokens, facts.num_tokens) == (1, 4 + 3, len(row["input_ids"]))


def test_a_conversation_ends_with_an_answer_that_was_cut_off(tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"turns": ["hi", "why?"]}])
    target = ScriptedTarget(lambda question: "abcdef")
    facts = regenerate(make_spec(prompts, max_new_tokens=4), target, TOKENIZER, tmp_path)
    [row] = rows_of(tmp_path)
    assert row["input_ids"][-4:] == text_ids("abcd")
    assert row["loss_mask"][-5:] == [False, True, True, True, True]
    assert row["finish_reasons"] == ["length"]
    assert [message["content"] for message in row["messages"]] == ["hi", "abcd"]
    assert (facts.num_conversations, facts.num_cut_off, facts.num_failed) == (1, 1, 0)


def test_a_conversation_ends_before_an_empty_answer_and_fails_without_any(tmp_path: Path) -> None:
    rows = [{"turns": ["hi", "empty"]}, {"turns": ["empty", "hi"]}]
    target = ScriptedTarget(lambda question: " \n" if question == "empty" else "yes")
    facts = regenerate(make_spec(write_rows(tmp_path / "p.jsonl", rows)), target, TOKENIZER, tmp_path)
    [row] = rows_of(tmp_path)
    assert [message["content"] for message in row["messages"]] == ["hi", "yes"]
    assert row["input_ids"][-4:] == [*text_ids("yes"), END]
    assert (facts.num_conversations, facts.num_failed) == (1, 1)


def test_prompts_past_the_limit_are_left_out_and_later_turns_past_it_are_not_asked(tmp_path: Path) -> None:
    # A prompt of one question has 1 + len("user\n") + 1 + 1 + len("assistant\n") = 18 tokens around the question's.
    rows = [{"turns": ["12345678"]}, {"turns": ["123456789"]}, {"turns": ["12", "3"]}]
    target = ScriptedTarget(lambda question: "yes")
    spec = make_spec(write_rows(tmp_path / "p.jsonl", rows), max_prompt_tokens=26)
    facts = regenerate(spec, target, TOKENIZER, tmp_path)
    assert [row["messages"][0]["content"] for row in rows_of(tmp_path)] == ["12345678", "12"]
    assert len(target.asked) == 2
    assert (facts.num_conversations, facts.num_failed) == (2, 1)


def test_equal_prompts_are_asked_once_and_written_in_the_order_of_the_source(tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in ("b", "a", "b", "c", "a")]
    target = ScriptedTarget(lambda question: "yes")
    facts = regenerate(make_spec(write_rows(tmp_path / "p.jsonl", rows)), target, TOKENIZER, tmp_path)
    assert [row["messages"][0]["content"] for row in rows_of(tmp_path)] == ["b", "a", "c"]
    assert len(target.asked) == len(set(target.asked)) == 3
    assert (facts.num_conversations, facts.num_failed) == (3, 0)


def test_a_request_that_the_backend_cannot_answer_fails_alone(tmp_path: Path) -> None:
    def answer(question: str) -> str:
        if question == "poison":
            raise OSError("cannot digest it")
        return "yes"

    rows = [{"turns": turns} for turns in (["a"], ["b", "poison"], ["poison"], None, ["c"])]
    facts = regenerate(make_spec(write_rows(tmp_path / "p.jsonl", rows)), ScriptedTarget(answer), TOKENIZER, tmp_path)
    assert [[message["content"] for message in row["messages"]] for row in rows_of(tmp_path)] == [
        ["a", "yes"],
        ["b", "yes"],
        ["c", "yes"],
    ]
    assert (facts.num_conversations, facts.num_failed) == (3, 2)


def test_a_stage_of_which_most_rows_fail_stops_with_the_first_reason(tmp_path: Path) -> None:
    def answer(question: str) -> str:
        raise OSError("no route to the server")

    spec = make_spec(write_rows(tmp_path / "p.jsonl", [{"prompt": str(i)} for i in range(3)]))
    with pytest.raises(RuntimeError, match=r"3 rows gave no conversation and only 0 did; .*no route to the server"):
        regenerate(spec, ScriptedTarget(answer), TOKENIZER, tmp_path)


def test_rows_of_which_most_hold_no_prompt_are_refused_before_the_first_request(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": ""}, {"prompt": ""}, {"prompt": None}]
    target = ScriptedTarget(lambda question: "yes")
    refused = (
        r"3 rows .* hold no usable prompt and only 2 different ones do; most often: an empty user turn\. .*`column`"
    )
    with pytest.raises(ValueError, match=refused):
        regenerate(make_spec(write_rows(tmp_path / "p.jsonl", rows)), target, TOKENIZER, tmp_path)
    assert target.asked == []
    # Half of them may.
    facts = regenerate(make_spec(write_rows(tmp_path / "p.jsonl", rows[:4])), target, TOKENIZER, tmp_path)
    assert (facts.num_conversations, facts.num_failed) == (2, 2)


def test_a_broken_backend_is_not_asked_for_every_row(tmp_path: Path) -> None:
    num_calls = 0

    def answer(question: str) -> str:
        nonlocal num_calls
        num_calls += 1
        raise OSError("no route to the server")

    spec = make_spec(write_rows(tmp_path / "p.jsonl", [{"prompt": str(i)} for i in range(1000)]), batch_size=50)
    with pytest.raises(RuntimeError, match=r"failed 33 requests and answered 0; .*OSError: no route to the server"):
        regenerate(spec, ScriptedTarget(answer), TOKENIZER, tmp_path)
    assert num_calls == 1 + 33


def test_a_source_without_prompts_is_refused(tmp_path: Path) -> None:
    spec = make_spec(write_rows(tmp_path / "p.jsonl", [{"prompt": ""}]))
    with pytest.raises(ValueError, match=r"hold no usable prompt: \{'an empty user turn': 1\}"):
        regenerate(spec, ScriptedTarget(str), TOKENIZER, tmp_path)


def test_a_run_killed_without_warning_goes_on_and_gives_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    rows = [{"turns": [f"question {i}"] + ["and then?"] * (i % 3)} for i in range(40)]
    spec = make_spec(write_rows(tmp_path / "p.jsonl", rows))
    killed = tmp_path / "killed"
    child = start(regenerate_slowly, spec, killed, tmp_path / "child-cache")
    journal = killed / PROGRESS_DIRECTORY / JOURNAL_NAME
    deadline = time.monotonic() + 60
    # The key and three batches of four; 79 answers are to come.
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 13:
        assert child.is_alive(), "the child ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.kill()
    child.join()
    done_before = {line["id"] for line in journal_lines(killed)[1:]}
    assert 12 <= len(done_before) < 79
    # As if the kill had come in the middle of a write.
    with journal.open("ab") as file:
        file.write(b'{"id":"torn/0","prompt_ids":[1,2')

    target = ScriptedTarget(scripted_answer)
    resumed_facts = regenerate(spec, target, TOKENIZER, killed)
    undisturbed = tmp_path / "undisturbed"
    facts = regenerate(spec, ScriptedTarget(scripted_answer), TOKENIZER, undisturbed)
    assert shard_bytes(killed) == shard_bytes(undisturbed)
    assert resumed_facts == facts
    assert facts.num_conversations == 40
    # 40 first turns, 13 prompts with one more and 13 with two more; nothing is asked for again.
    assert len(done_before) + len(target.asked) == 40 + 13 + 2 * 13
    assert not done_before & set(target.asked)
    ids = [line["id"] for line in journal_lines(killed)[1:]]
    assert len(ids) == len(set(ids)) == 79


def test_a_finished_journal_is_not_asked_for_again_and_goes_when_the_artifact_is_sealed(tmp_path: Path) -> None:
    spec = make_spec(write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}]))
    out = tmp_path / "out"
    facts = regenerate(spec, ScriptedTarget(lambda question: "yes"), TOKENIZER, out)
    # Killed before the seal: the answers are still there.
    target = ScriptedTarget(lambda question: "yes")
    assert regenerate(spec, target, TOKENIZER, out) == facts
    assert target.asked == []
    seal(out, facts, stage=spec.stage, key=spec.key(), inputs={}, elapsed_s=1.0)
    assert not (out / PROGRESS_DIRECTORY).exists()
    assert list(load_artifact(out, stage.Conversations).files) == ["conversations-00000.parquet"]


def test_the_journal_of_another_spec_is_refused(tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])
    regenerate(make_spec(prompts), ScriptedTarget(lambda question: "yes"), TOKENIZER, tmp_path)
    with pytest.raises(ValueError, match=r"journal\.jsonl was begun for spec \w+, this is \w+: delete it"):
        regenerate(make_spec(prompts, seed=1), ScriptedTarget(str), TOKENIZER, tmp_path)


def test_a_journal_keeps_one_answer_for_a_request(tmp_path: Path) -> None:
    request, completion = GenerationRequest("a/0", [1, 2]), Completion("a/0", (5, 6), "stop")
    journal = Journal(tmp_path / "journal.jsonl", key="k")
    journal.append(request, completion)
    with pytest.raises(ValueError, match="a/0 was answered twice"):
        journal.append(request, completion)
    journal.close()
    reopened = Journal(tmp_path / "journal.jsonl", key="k")
    assert (len(reopened), "a/0" in reopened, "a/1" in reopened) == (1, True, False)
    assert reopened["a/0"] == Exchange((1, 2), (5, 6), "stop")
    reopened.close()


def test_a_stage_resumed_on_another_day_keeps_the_prompts_that_were_answered(tmp_path: Path) -> None:
    spec = make_spec(write_rows(tmp_path / "p.jsonl", [{"turns": ["hi", "why?"]}]))
    dated = tiny.make_tokenizer()

    def interrupted(question: str) -> str:
        if question == "why?":
            raise KeyboardInterrupt
        return "yes"

    dated.chat_template = "Monday " + tiny.CHAT_TEMPLATE
    with pytest.raises(KeyboardInterrupt):
        regenerate(spec, ScriptedTarget(interrupted), dated, tmp_path)
    dated.chat_template = "Tuesday " + tiny.CHAT_TEMPLATE
    regenerate(spec, ScriptedTarget(lambda question: "no"), dated, tmp_path)
    [row] = rows_of(tmp_path)
    text = TOKENIZER.decode(row["input_ids"])
    assert text.startswith("Monday <|im_start|>user\nhi")
    assert "Tuesday" not in text
    assert [message["content"] for message in row["messages"]] == ["hi", "yes", "why?", "no"]


def test_metrics_say_how_fast_the_target_spoke(tmp_path: Path) -> None:
    spec = make_spec(write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}]))
    regenerate(spec, ScriptedTarget(lambda question: "yes"), TOKENIZER, tmp_path)
    [line] = [json.loads(text) for text in (tmp_path / METRICS_NAME).read_text().splitlines()]
    assert line["step"] == 2
    assert line["regenerate/tokens"] == 8
    assert line["regenerate/tokens_per_s"] > 0


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_real_target_answers_what_plain_transformers_answers(
    tmp_path: Path, tiny_target: ResolvedTarget, temperature: float
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompts = write_rows(tmp_path / "p.jsonl", [{"turns": [f"question {i}", "why?"]} for i in range(5)])
    scripted = make_spec(prompts, max_new_tokens=12, temperature=temperature, batch_size=2)
    spec = RegenerateSpec(target=tiny_target, data=scripted.data, batch_size=2)
    facts = stage.main(spec, tmp_path / "a")
    assert facts.num_conversations + facts.num_failed == 5
    assert facts.num_conversations >= 3
    if temperature:
        stage.main(spec, tmp_path / "b")
        assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
        return
    model = AutoModelForCausalLM.from_pretrained(tiny_target.model, dtype=torch.float32)
    for row in rows_of(tmp_path / "a"):
        # Every supervised token is the target's own greedy choice after all tokens before it.
        greedy = model(torch.tensor([row["input_ids"]])).logits[0].argmax(dim=-1).tolist()
        for i, is_answer in enumerate(row["loss_mask"]):
            if is_answer:
                assert greedy[i - 1] == row["input_ids"][i]
