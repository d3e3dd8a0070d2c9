from pathlib import Path
from typing import Any

import pytest

from specforge_core.data.conversations import Conversation, write_conversations
from specforge_core.data.viewer import find_conversation, render_conversation, show_conversation
from specforge_core.stages import ResolvedTarget
from tests.data.scripted_target import END, START, TOKENIZER, text_ids


def two_turns() -> Conversation:
    pieces = [
        (False, [START, *text_ids("user\nhi"), END, START, *text_ids("assistant\n")]),
        (True, [*text_ids("yes [no]"), END]),
        (False, [START, *text_ids("user\nwhy?"), END, START, *text_ids("assistant\n")]),
        (True, text_ids("be")),
    ]
    return Conversation(
        id="abc123",
        source="file/train",
        messages=({"role": "user", "content": "not what is shown"},),
        input_ids=tuple(token for _, ids in pieces for token in ids),
        loss_mask=tuple(is_answer for is_answer, ids in pieces for _ in ids),
        finish_reasons=("stop", "length"),
    )


def row_of(conversation: Conversation) -> dict[str, Any]:
    return conversation._asdict()


EXPECTED = """\
abc123 from file/train: 53 tokens, 11 of them supervised

── 20 tokens given
<|im_start|>user
hi<|im_end|><|im_start|>assistant

── 9 tokens answered, stop
⟦yes [no]<|im_end|>⟧
── 22 tokens given
<|im_start|>user
why?<|im_end|><|im_start|>assistant

── 2 tokens answered, length
⟦be⟧
"""


def test_supervised_tokens_stand_in_brackets_where_there_are_no_colours() -> None:
    assert render_conversation(TOKENIZER, row_of(two_turns()), has_colours=False).plain == EXPECTED


def test_supervised_tokens_have_a_colour_of_their_own_on_a_terminal() -> None:
    text = render_conversation(TOKENIZER, row_of(two_turns()), has_colours=True)
    assert "⟦" not in text.plain
    coloured = [text.plain[span.start : span.end] for span in text.spans if span.style == "bold green"]
    assert coloured == ["yes [no]<|im_end|>", "be"]


def test_a_stored_conversation_is_shown_by_position_and_by_the_start_of_its_id(
    tmp_path: Path, tiny_target: ResolvedTarget, capsys: pytest.CaptureFixture[str]
) -> None:
    write_conversations(tmp_path, [two_turns()._replace(id="other"), two_turns()])
    for id_or_index in (1, "1", "abc"):
        show_conversation(tmp_path, id_or_index=id_or_index, target=tiny_target)
        assert capsys.readouterr().out.rstrip() == EXPECTED.rstrip()


def test_an_unknown_or_ambiguous_id_is_refused() -> None:
    assert find_conversation(["ab", "ac"], "ac") == 1
    for id_or_index, num_matches in (("a", 2), ("x", 0), (2, 0)):
        with pytest.raises(ValueError, match=f"{num_matches} of the 2 conversations .* a position from 0 to 1"):
            find_conversation(["ab", "ac"], id_or_index)
