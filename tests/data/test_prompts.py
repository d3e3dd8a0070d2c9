import gzip
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions
import pandas as pd
import pytest

from specforge_core.data.prompts import Prompt, asked_messages, load_prompts, read_rows
from specforge_core.demo import corpus
from specforge_core.manifest_sections import PromptSource
from tests.data.scripted_target import write_rows

USER_HI = {"role": "user", "content": "hi"}


def prompts_of(tmp_path: Path, rows: list[dict[str, Any]], **source: Any) -> list[Prompt]:
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    return list(load_prompts(PromptSource(dataset=str(path), **source)))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "system", "content": "be kind"}, USER_HI]}, ["system: be kind", "user: hi"]),
        ({"messages": [{"role": "developer", "content": "be kind"}, USER_HI]}, ["system: be kind", "user: hi"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]}, ["user: a\nb"]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, ["user: hi"]),
        ({"turns": ["hi", "and then?"]}, ["user: hi", "user: and then?"]),
        ({"prompt": ["hi", "and then?"], "category": "x"}, ["user: hi", "user: and then?"]),
        ({"prompt": "hi", "completion": "no"}, ["user: hi"]),
        ({"question": "1+1?", "answer": "2"}, ["user: 1+1?"]),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, ["user: Add.\n\n1, 2"]),
        ({"instruction": "Sing.", "input": "", "output": "la"}, ["user: Sing."]),
        ({"text": "hi"}, ["user: hi"]),
        ({"messages": [USER_HI], "prompt": "not this one"}, ["user: hi"]),
    ],
)
def test_every_accepted_form_gives_the_same_messages(tmp_path: Path, row: dict[str, Any], expected: list[str]) -> None:
    [prompt] = prompts_of(tmp_path, [row])
    assert [f"{message['role']}: {message['content']}" for message in prompt.messages] == expected


def test_answers_of_other_models_are_left_out_and_every_question_is_kept() -> None:
    turns = [USER_HI, {"role": "assistant", "content": None}, user("more"), user("and more"), {"role": "assistant"}]
    assert asked_messages(turns) == (USER_HI, user("more"), user("and more"))


def test_an_unknown_form_names_the_columns_found_and_the_accepted_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has Body, Question\. Accepted: `messages`.*`column`"):
        prompts_of(tmp_path, [{"Body": "a", "Question": "b"}])


def test_a_named_column_is_taken_whatever_its_name_and_form(tmp_path: Path) -> None:
    rows = [{"Body": "a", "Question": "b", "prompt": "c"}]
    assert prompts_of(tmp_path, rows, column="Question")[0].messages == (user("b"),)
    with pytest.raises(ValueError, match=r"column='question' is not there; it has Body, Question"):
        prompts_of(tmp_path, rows, column="question")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no user turn"),
        ([{"role": "assistant", "content": "hello"}], "no user turn"),
        ([{"role": "system", "content": "be kind"}], "no user turn"),
        ([USER_HI, user("  ")], "an empty user turn"),
        ([USER_HI, {"role": "system", "content": "be kind"}], "a system turn after another turn"),
        ([USER_HI, {"role": "tool", "content": "42"}], "role 'tool' is not one of"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "a part of a turn is no text"),
        (None, "a prompt is a text or a list of turns"),
    ],
)
def test_a_bad_row_is_reported_and_does_not_stop_the_others(tmp_path: Path, messages: Any, reason: str) -> None:
    path = write_rows(tmp_path / "prompts.jsonl", [{"messages": messages}, {"messages": [USER_HI]}])
    bad, good = read_rows(PromptSource(dataset=str(path)))
    assert not isinstance(bad, Prompt)
    assert reason in bad.reason
    assert isinstance(good, Prompt)
    assert good.messages == (USER_HI,)


def test_bad_rows_are_counted_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": ""}, {"prompt": "hi"}, {"prompt": None}]
    assert [prompt.messages for prompt in prompts_of(tmp_path, rows)] == [(USER_HI,)]
    assert "prompts.jsonl/train: 2 rows hold no usable prompt" in caplog.text


def test_equal_messages_have_equal_ids_in_whatever_form_they_are_written(tmp_path: Path) -> None:
    [plain] = prompts_of(tmp_path, [{"prompt": "hi"}])
    chat = [USER_HI, {"role": "assistant", "content": "hello"}]
    same, other = prompts_of(tmp_path, [{"messages": chat}, {"messages": [user("hi!")]}])
    assert plain.id == same.id != other.id


def test_the_limit_takes_rows_from_the_front(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "three"}]
    assert [prompt.messages[0]["content"] for prompt in prompts_of(tmp_path, rows, limit=2)] == ["one", "two"]
    assert len(prompts_of(tmp_path, rows, limit=10)) == 3


def test_a_parquet_file_reads_like_a_json_file(tmp_path: Path) -> None:
    rows = [{"messages": [USER_HI], "final_answer": 4}]
    pd.DataFrame(rows).to_parquet(tmp_path / "prompts.parquet")
    [prompt] = load_prompts(PromptSource(dataset=str(tmp_path / "prompts.parquet")))
    assert prompt == prompts_of(tmp_path, rows)[0]._replace(source="prompts.parquet/train")
    assert prompt.final_answer == "4"


def test_a_named_answer_column_is_read_and_must_be_there(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": 2, "final_answer": "not this one"}, {"question": "0?", "answer": None}]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    prompts = load_prompts(PromptSource(dataset=str(path)), answer_column="answer")
    assert [prompt.final_answer for prompt in prompts] == ["2", None]
    with pytest.raises(ValueError, match=r"the answer's column='Answer' is not there; it has question, answer, final_"):
        list(load_prompts(PromptSource(dataset=str(path)), answer_column="Answer"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("hi")
    with pytest.raises(ValueError, match=r"prompts\.txt: a local file of prompts ends in one of \.json, \.jsonl"):
        list(load_prompts(PromptSource(dataset=str(path))))


GOOD = b'{"prompt": "hi"}\n'


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        (
            "p.jsonl",
            GOOD + b'\n{"prompt": "a"\n' + GOOD,
            r"line 3 is not JSON \(Expecting ',' delimiter: character 15\)",
        ),
        ("p.jsonl", GOOD + b'{"prompt": "caf\xe9"}\n', r"line 2 is not UTF-8 \(it has a byte 0xe9\)"),
        ("p.jsonl", GOOD + b'["a"]\n', "line 2 is no object"),
        ("p.jsonl", b"", "it has no rows"),
        ("p.jsonl", b"\n", "it has no rows"),
        ("p.json", b"[]", "it has no rows"),
        ("p.json", b'[{"prompt": "a"},\n {"prompt" "b"}]', r"line 2 is not JSON .*: character 12\)"),
        ("p.json", b'[{"prompt": "a"},\n\n{"prompt": "caf\xe9"}]', "line 3 is not UTF-8 .*"),
        ("p.json", GOOD + b'{"prompt": \n', "line 2 is not JSON .*"),
        ("p.jsonl.gz", GOOD + b"{", "line 2 is not JSON .*"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_its_first_bad_line(
    tmp_path: Path, name: str, content: bytes, fault: str
) -> None:
    # Compressed here: with its time in it, an archive among the parameters gives a test another name every second.
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=f"/{name}: {fault}; accepted: .* UTF-8.* `messages`"):
        list(load_prompts(PromptSource(dataset=str(tmp_path / name))))


def test_what_only_the_reader_finds_wrong_is_told_with_the_name(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"/p\.parquet: Parquet file size is 4 bytes"):
        list(load_prompts(PromptSource(dataset=str(tmp_path / "p.parquet"))))
    with pytest.raises(ValueError, match=r'/prompts\.jsonl: Unknown split "test"'):
        prompts_of(tmp_path, [{"prompt": "a"}], split="test")


def test_a_disk_that_fails_while_a_good_file_is_read_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise datasets.exceptions.DatasetGenerationError("while generating") from OSError("disk")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        prompts_of(tmp_path, [{"prompt": "a"}])


def test_the_demo_corpus_is_a_source_of_one_family_or_of_all() -> None:
    prompts = list(load_prompts(PromptSource(dataset="builtin:demo", config="followup", split="heldout", limit=3)))
    conversations = islice(corpus.generate("heldout", seed=1, family="followup"), 3)
    for prompt, conversation in zip(prompts, conversations, strict=True):
        asked = [message for message in conversation.messages if message["role"] != "assistant"]
        assert list(prompt.messages) == asked
        assert prompt.final_answer == conversation.final_answer
    assert prompts[0].source == "builtin:demo/followup/heldout"
    assert len(list(load_prompts(PromptSource(dataset="builtin:demo", limit=5)))) == 5


def test_the_endless_demo_corpus_needs_a_limit_and_a_split_that_exists() -> None:
    with pytest.raises(ValueError, match="builtin:demo is endless: give its source a `limit`"):
        list(load_prompts(PromptSource(dataset="builtin:demo")))
    with pytest.raises(ValueError, match="splits train, heldout, not 'test'"):
        list(load_prompts(PromptSource(dataset="builtin:demo", split="test", limit=1)))
