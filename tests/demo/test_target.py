"""The target that ships with the code: small, loadable, what its card says, and able to do its tasks."""

import hashlib
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from specforge_core.demo.corpus import FAMILIES, answers_match, generate
from specforge_core.demo.target_card import MAX_WEIGHT_BYTES, generate_replies, mean_loss

TARGET = Path(__file__).parents[2] / "specforge_core/demo/target"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()


def test_the_weights_are_safetensors_in_bfloat16_and_small_enough_to_ship():
    assert json.loads((TARGET / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(TARGET).dtype == torch.bfloat16
    assert [path.name for path in TARGET.glob("*.safetensors")] == ["model.safetensors"]
    assert (TARGET / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES == 16_000_000


def test_the_card_and_the_training_result_describe_these_weights():
    weights = (TARGET / "model.safetensors").read_bytes()
    result = json.loads((TARGET / "training_result.json").read_text())
    card = (TARGET / "README.md").read_text()
    assert result["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert result["weights_bytes"] == len(weights)
    for shown in (result["weights_sha256"], result["command"], result["hardware"], f"{result['steps']:,} steps"):
        assert shown in card
    assert set(result["heldout"]) == set(FAMILIES)
    for family, score in result["heldout"].items():
        assert (
            f"| {family} | {score['loss_nats_per_token']:.3f} | {score['num_exact']} of {score['num_checked']} |"
            in card
        )


def test_it_answers_heldout_questions_and_ends_by_itself(model: LlamaForCausalLM):
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    conversations = [
        conversation
        for family in ("arithmetic", "convert", "rewrite")
        for conversation in islice(generate("heldout", seed=71, family=family), 4)
    ]
    replies = generate_replies(model, tokenizer, conversations, max_new_tokens=200)
    assert all(reply.ended for reply in replies)
    right = [answers_match(reply.text, c.final_answer) for c, reply in zip(conversations, replies, strict=True)]
    assert sum(right) >= 11, [reply.text for reply, is_right in zip(replies, right, strict=True) if not is_right]


def test_its_loss_is_the_same_after_it_has_generated(model: LlamaForCausalLM):
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    conversations = list(islice(generate("heldout", seed=72, family="followup"), 8))
    before = mean_loss(model, tokenizer, conversations)
    generate_replies(model, tokenizer, conversations, max_new_tokens=1)
    assert mean_loss(model, tokenizer, conversations) == before
    # The choice between equal wordings is all that is left to guess.
    assert before < 0.2
