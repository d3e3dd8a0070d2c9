import hashlib
import logging
from typing import Any

import pytest

from specforge_core.data.chat_template import chat_template_sha256, next_turn_ids, prompt_ids
from tests import tiny
from tests.data.scripted_target import END, START, text_ids

SYSTEM = {"role": "system", "content": "be kind"}
FIRST = {"role": "user", "content": "hi"}
SECOND = {"role": "user", "content": "why?"}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def tokenizer_with(template: str, name: str) -> Any:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.name_or_path = name
    return tokenizer


# `transformers` renders with `trim_blocks`: the line end after a block of the tiny template is not written.
def test_prompt_ids_are_the_template_up_to_where_the_answer_starts() -> None:
    expected = [START, *text_ids("system\nbe kind"), END, START, *text_ids("user\nhi"), END]
    assert prompt_ids(tiny.make_tokenizer(), [SYSTEM, FIRST]) == [*expected, START, *text_ids("assistant\n")]


def test_the_next_turn_adds_what_the_template_writes_after_the_end_of_the_answer() -> None:
    added = next_turn_ids(tiny.make_tokenizer(), [FIRST, assistant("hello"), SECOND], end_id=END)
    assert added == [START, *text_ids("user\nwhy?"), END, START, *text_ids("assistant\n")]


def test_a_conversation_put_together_turn_by_turn_equals_its_rendering() -> None:
    # True for the tiny tokenizer, a token a byte, whose text has one tokenisation only.
    tokenizer = tiny.make_tokenizer()
    ids = prompt_ids(tokenizer, [SYSTEM, FIRST])
    messages = [SYSTEM, FIRST]
    for answer in ("hello", "user\nassistant", "hello"):
        messages += [assistant(answer), SECOND]
        ids = [*ids, *text_ids(answer), END, *next_turn_ids(tokenizer, messages, end_id=END)]  # type: ignore[misc]
    assert ids == prompt_ids(tokenizer, messages)


def test_a_template_that_drops_earlier_thinking_gives_no_next_turn_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    drops_thinking = tiny.CHAT_TEMPLATE.replace(
        "{% generation %}{{ message['content'] }}", "{% generation %}{{ message['content'].split('</think>')[-1] }}"
    )
    tokenizer = tokenizer_with(drops_thinking, "org/thinker")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert next_turn_ids(tokenizer, [FIRST, assistant("<think>a</think>b"), SECOND], end_id=END) is None
    assert [record.getMessage() for record in caplog.records] == [
        "the chat template of org/thinker rewrites the answers of earlier turns: "
        "such conversations end before the next turn"
    ]
    assert next_turn_ids(tokenizer, [FIRST, assistant("b"), SECOND], end_id=END) is not None


def test_a_template_that_trims_white_space_is_noticed_where_it_changes_something() -> None:
    tokenizer = tokenizer_with(tiny.CHAT_TEMPLATE.replace("message['content'] }}", "message['content'] | trim }}"), "t")
    assert next_turn_ids(tokenizer, [FIRST, assistant("b\n"), SECOND], end_id=END) is None
    assert next_turn_ids(tokenizer, [FIRST, assistant("b"), SECOND], end_id=END) is not None


def test_a_template_that_opens_an_earlier_answer_otherwise_than_a_new_one_gives_no_next_turn() -> None:
    # Harmony (gpt-oss) writes the channel of an earlier answer, which a new answer begins with itself.
    template = tiny.CHAT_TEMPLATE.replace("{% generation %}", "{% generation %}<|final|>")
    assert next_turn_ids(tokenizer_with(template, "h"), [FIRST, assistant("b"), SECOND], end_id=END) is None


def test_an_answer_that_ended_with_another_token_than_the_template_writes_gives_no_next_turn() -> None:
    messages = [FIRST, assistant("b"), SECOND]
    assert next_turn_ids(tiny.make_tokenizer(), messages, end_id=START) is None


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = tokenizer_with("", "org/base-model")
    with pytest.raises(ValueError, match="tokenizer of org/base-model has no chat template"):
        chat_template_sha256(tokenizer)


def test_the_digest_is_that_of_the_template() -> None:
    expected = hashlib.sha256(tiny.CHAT_TEMPLATE.encode()).hexdigest()
    assert chat_template_sha256(tiny.make_tokenizer()) == expected
