from pathlib import Path

import pytest

from specforge_core.data import conversations as stored
from specforge_core.data.conversations import (
    Conversation,
    ConversationCounts,
    conversation_shards,
    load_conversations,
    write_conversations,
)


def make_conversation(number: int, finish_reason: str = "stop") -> Conversation:
    messages = ({"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "é"})
    return Conversation(
        id=f"id-{number}",
        source="file/train",
        messages=messages,  # type: ignore[arg-type]
        input_ids=(7, number, 9),
        loss_mask=(False, True, True),
        finish_reasons=(finish_reason,),
    )


def test_conversations_come_back_as_they_were_written_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "CONVERSATIONS_PER_SHARD", 2)
    written = [make_conversation(number) for number in (4, 2, 9, 1, 3)]
    write_conversations(tmp_path, iter(written))
    assert [path.name for path in conversation_shards(tmp_path)] == [
        f"conversations-0000{shard}.parquet" for shard in (0, 1, 2)
    ]
    for row, conversation in zip(load_conversations(tmp_path), written, strict=True):
        assert row["id"] == conversation.id
        assert row["source"] == conversation.source
        assert row["messages"] == list(conversation.messages)
        assert row["input_ids"] == list(conversation.input_ids)
        assert row["loss_mask"] == list(conversation.loss_mask)
        assert row["finish_reasons"] == ["stop"]


def test_counts_are_sums_over_what_was_written(tmp_path: Path) -> None:
    counts = write_conversations(tmp_path, [make_conversation(1), make_conversation(2, "length")])
    assert counts == ConversationCounts(num_conversations=2, num_tokens=6, num_loss_tokens=4, num_cut_off=1)


def test_equal_conversations_are_equal_bytes_whatever_lay_there_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "CONVERSATIONS_PER_SHARD", 1)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_conversations(tmp_path / "a", [make_conversation(number) for number in range(5)])
    for directory in (tmp_path / "a", tmp_path / "b"):
        write_conversations(directory, [make_conversation(number) for number in range(2)])
    shards_a, shards_b = conversation_shards(tmp_path / "a"), conversation_shards(tmp_path / "b")
    assert [path.read_bytes() for path in shards_a] == [path.read_bytes() for path in shards_b]
    assert len(shards_a) == 2


def test_a_folder_without_conversations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no conversations-\*\.parquet; build it with"):
        load_conversations(tmp_path)
