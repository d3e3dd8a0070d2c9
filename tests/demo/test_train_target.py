"""The demo target's trainer: what the loss sees, and the whole program on a CPU."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from specforge_core.demo.corpus import generate
from specforge_core.demo.target_data import load_tokenizer, tokenize

TARGET = Path(__file__).parents[2] / "specforge_core/demo/target"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(TARGET)


def test_tokens_and_masks_are_those_of_the_chat_template(tokenizer: PreTrainedTokenizerBase):
    conversations = list(islice(generate("heldout", seed=3), 40))
    corpus = tokenize(tokenizer, conversations)
    for i, conversation in enumerate(conversations):
        row = slice(corpus.starts_R1[i], corpus.starts_R1[i + 1])
        by_template = tokenizer.apply_chat_template(
            list(conversation.messages), return_dict=True, return_assistant_tokens_mask=True
        )
        # The template ends with a newline that nobody has to predict.
        assert corpus.tokens_N[row].tolist() == by_template["input_ids"][:-1]
        assert corpus.loss_N[row].astype(int).tolist() == by_template["assistant_masks"][:-1]


def test_a_padded_call_leaves_no_padding_behind(tokenizer: PreTrainedTokenizerBase):
    conversations = list(islice(generate("heldout", seed=3), 8))
    before = tokenize(tokenizer, conversations)
    tokenizer(["short", "a longer text than the other"], padding=True, padding_side="left")
    after = tokenize(tokenizer, conversations)
    assert len(set(np.diff(before.starts_R1))) > 1
    assert after.starts_R1.tolist() == before.starts_R1.tolist()
    assert after.tokens_N.tolist() == before.tokens_N.tolist()
