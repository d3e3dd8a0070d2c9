"""The demo target's trainer: what the loss sees, and the whole program on a CPU."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from specforge_core.demo import target_data
from specforge_core.demo.corpus import generate
from specforge_core.demo.target_data import build_corpus, load_tokenizer, tokenize

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


@pytest.mark.slow
def test_a_folder_keeps_corpora_of_several_sizes_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target_data, "CHUNK_CONVERSATIONS", 2)
    # Two processes for three conversations, of which the second has one left.
    sizes = [2, 3, 2]
    corpora = [build_corpus(TARGET, tmp_path, num_conversations=size, seed=0) for size in sizes]
    assert [len(corpus.starts_R1) - 1 for corpus in corpora] == sizes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_smoke_run_leaves_a_folder_that_loads(tmp_path: Path):
    out = tmp_path / "target"
    command = [sys.executable, "-m", "specforge_core.demo.train_target", "--smoke", "--device", "cpu"]
    subprocess.run([*command, "--out", str(out), "--data", str(tmp_path / "corpus")], check=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in TARGET.iterdir())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer)
    result = json.loads((out / "training_result.json").read_text())
    assert result["steps"] > 0
    assert result["num_conversations"] == 1500
    # A card is public: where this machine keeps its files is not part of it.
    assert str(tmp_path) not in (out / "README.md").read_text()
    assert (out / "model.safetensors").read_bytes() != (TARGET / "model.safetensors").read_bytes()
