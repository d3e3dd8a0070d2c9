from pathlib import Path

import numpy as np
import pytest

from specforge_core.artifacts import seal
from specforge_core.data import vocab
from specforge_core.data.conversations import Conversation, write_conversations
from specforge_core.data.vocab import VOCABULARY_NAME, build_vocab_map, load_vocabulary, supervised_token_counts
from specforge_core.facts import Conversations
from specforge_core.stages import ResolvedTarget, VocabularySpec


def conversation(input_ids: list[int], loss_mask: list[int]) -> Conversation:
    return Conversation(
        id=str(input_ids),
        source="file/train",
        messages=({"role": "user", "content": "hi"},),
        input_ids=tuple(input_ids),
        loss_mask=tuple(map(bool, loss_mask)),
        finish_reasons=("stop",),
    )


def conversations_artifact(directory: Path, *conversations: Conversation) -> Path:
    directory.mkdir()
    counts = write_conversations(directory, conversations)
    facts = Conversations(**counts._asdict(), num_failed=0, chat_template_sha256="0")
    seal(directory, facts, stage="regenerate", key="key", inputs={}, elapsed_s=1.0)
    return directory


def test_vocab_map_round_trips_every_kept_token() -> None:
    d2t, t2d = build_vocab_map([5, 0, 9, 1, 7], draft_vocab_size=3)
    assert (np.arange(3) + d2t).tolist() == [0, 2, 4]  # counts 5, 9, 7
    assert d2t.tolist() == [0, 1, 2]
    assert t2d.tolist() == [True, False, True, False, True]
    assert (d2t.dtype, t2d.dtype) == (np.int64, np.bool_)


def test_of_equally_frequent_tokens_the_lower_ids_are_kept() -> None:
    d2t, _ = build_vocab_map([2, 3, 2, 2, 3], draft_vocab_size=3)
    assert (np.arange(3) + d2t).tolist() == [0, 1, 4]


def test_a_draft_vocabulary_with_room_is_filled_with_the_lowest_unused_ids() -> None:
    d2t, t2d = build_vocab_map([0, 0, 0, 0, 8, 0], draft_vocab_size=3)
    assert (np.arange(3) + d2t).tolist() == [0, 1, 4]
    assert t2d.sum() == 3


def test_a_draft_vocabulary_of_the_targets_size_changes_no_id() -> None:
    d2t, t2d = build_vocab_map([3, 0, 1], draft_vocab_size=3)
    assert d2t.tolist() == [0, 0, 0]
    assert t2d.all()


def test_a_draft_vocabulary_larger_than_the_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="draft_vocab_size=4 is more than the target's 3 tokens; lower it"):
        build_vocab_map([3, 0, 1], draft_vocab_size=4)


def test_only_supervised_tokens_count(tmp_path: Path) -> None:
    directory = conversations_artifact(
        tmp_path / "conversations", conversation([1, 1, 2, 5], [0, 0, 1, 1]), conversation([5, 3], [1, 0])
    )
    assert supervised_token_counts(directory, 7).tolist() == [0, 0, 1, 0, 0, 2, 0]


def test_conversations_without_supervised_tokens_are_refused(tmp_path: Path) -> None:
    directory = conversations_artifact(tmp_path / "conversations", conversation([1, 2], [0, 0]))
    with pytest.raises(ValueError, match="has no supervised token"):
        supervised_token_counts(directory, 7)


def test_the_stage_writes_the_map_of_the_most_frequent_answers_and_its_coverage(
    tmp_path: Path, tiny_target: ResolvedTarget
) -> None:
    # Supervised: 100 four times, 7 twice, 250 once.
    directory = conversations_artifact(
        tmp_path / "conversations",
        conversation([9, 100, 100, 7], [0, 1, 1, 1]),
        conversation([100, 7, 250, 100], [1, 1, 1, 1]),
    )
    for out in (tmp_path / "a", tmp_path / "b"):
        out.mkdir()
        spec = VocabularySpec(target=tiny_target, conversations=directory, draft_vocab_size=2)
        facts = vocab.main(spec, out)
    # 256 bytes and 3 special tokens, see tests/tiny.py.
    assert (facts.draft_vocab_size, facts.target_vocab_size) == (2, 259)
    assert facts.coverage == 6 / 7
    d2t, t2d = load_vocabulary(tmp_path / "a")
    assert (np.arange(2) + d2t).tolist() == [7, 100]
    assert np.flatnonzero(t2d).tolist() == [7, 100]
    assert (tmp_path / "a" / VOCABULARY_NAME).read_bytes() == (tmp_path / "b" / VOCABULARY_NAME).read_bytes()
