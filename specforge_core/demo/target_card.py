"""Evaluate the demo target on held-out problems and write its card."""

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from specforge_core.demo.corpus import FAMILIES, Conversation, answers_match, generate
from specforge_core.demo.target_data import load_tokenizer, tokenize

# Apart from the seeds of prompts that other parts of the factory draw.
EVALUATION_SEED = 90_001
GENERATION_BATCH = 256
LOSS_BATCH = 64
# The Hub's and this repository's limit for a file kept without Git LFS, in bytes.
MAX_WEIGHT_BYTES = 16_000_000


class FamilyScore(NamedTuple):
    """One family's results on held-out problems."""

    loss_nats_per_token: float
    num_checked: int
    num_exact: int
    num_generated: int
    num_ended: int
    mean_answer_tokens: float


class Sample(NamedTuple):
    """A held-out question and what the target wrote."""

    family: str
    question: str
    reply: str
    correct: bool | None


class Evaluation(NamedTuple):
    """Scores per family and one sample of each."""

    scores: dict[str, FamilyScore]
    samples: tuple[Sample, ...]
    max_new_tokens: int


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]) -> float:
    """Cross-entropy in nats over all assistant tokens of the conversations."""
    corpus = tokenize(tokenizer, conversations)
    loss_sum, num_tokens = 0.0, 0
    bounds = list(zip(corpus.starts_R1[:-1], corpus.starts_R1[1:], strict=True))
    for first in range(0, len(bounds), LOSS_BATCH):
        rows = [torch.from_numpy(corpus.tokens_N[a:b].astype("int64")) for a, b in bounds[first : first + LOSS_BATCH]]
        masks = [torch.from_numpy(corpus.loss_N[a:b]) for a, b in bounds[first : first + LOSS_BATCH]]
        ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        mask_BT = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True).to(model.device)[:, 1:]
        logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
        loss_sum += F.cross_entropy(logits_BTV[mask_BT], ids_BT[:, 1:][mask_BT], reduction="sum").item()
        num_tokens += int(mask_BT.sum())
    return loss_sum / num_tokens


class Reply(NamedTuple):
    """A generated answer, its length in tokens, and whether the target ended it itself."""

    text: str
    num_tokens: int
    ended: bool


@torch.inference_mode()
def generate_replies(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    *,
    max_new_tokens: int,
) -> list[Reply]:
    """Greedy answers to the last user turn of each conversation."""
    replies = []
    for first in range(0, len(conversations), GENERATION_BATCH):
        prompts = [
            tokenizer.apply_chat_template(list(c.messages[:-1]), tokenize=False, add_generation_prompt=True)
            for c in conversations[first : first + GENERATION_BATCH]
        ]
        inputs = tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        )
        out_BT = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
        for ids in out_BT[:, inputs["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in ids
            length = ids.index(tokenizer.eos_token_id) if ended else len(ids)
            replies.append(Reply(tokenizer.decode(ids[:length]), length, ended))
    return replies


def evaluate_target(folder: Path, *, device: str, num_prompts: int, max_new_tokens: int) -> Evaluation:
    """Loss, exact answers and self-ended answers of the saved model on held-out problems of each family."""
    tokenizer = load_tokenizer(folder)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device).eval()
    scores, samples = {}, []
    for family in tqdm(FAMILIES, desc="evaluate"):
        conversations = list(islice(generate("heldout", seed=EVALUATION_SEED, family=family), num_prompts))
        replies = generate_replies(model, tokenizer, conversations, max_new_tokens=max_new_tokens)
        checked = [
            answers_match(reply.text, c.final_answer) if c.final_answer is not None else None
            for c, reply in zip(conversations, replies, strict=True)
        ]
        scores[family] = FamilyScore(
            loss_nats_per_token=mean_loss(model, tokenizer, conversations),
            num_checked=sum(each is not None for each in checked),
            num_exact=sum(each is True for each in checked),
            num_generated=len(replies),
            num_ended=sum(reply.ended for reply in replies),
            mean_answer_tokens=sum(reply.num_tokens for reply in replies) / len(replies),
        )
        # One right and one wrong answer, where there are both: the card must not show the lucky ones only.
        for outcome in (True, False):
            if outcome in checked:
                i = checked.index(outcome)
                samples.append(Sample(family, conversations[i].messages[-2]["content"], replies[i].text, outcome))
    return Evaluation(scores, tuple(samples), max_new_tokens)


def write_card(folder: Path, run: dict[str, str | int | float], evaluation: Evaluation) -> None:
    """Write README.md and training_result.json beside the weights.

    Raises: ValueError when the weights are larger than MAX_WEIGHT_BYTES.
    """
    weights = (folder / "model.safetensors").read_bytes()
    if len(weights) > MAX_WEIGHT_BYTES:
        raise ValueError(
            f"model.safetensors has {len(weights)} bytes, the limit is {MAX_WEIGHT_BYTES}; make the model smaller"
        )
    result = {
        **run,
        "weights_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "max_new_tokens": evaluation.max_new_tokens,
        "heldout": {family: score._asdict() for family, score in evaluation.scores.items()},
    }
    (folder / "training_result.json").write_text(json.dumps(result, indent=2) + "\n")
    rows = "\n".join(
        f"| {family} | {s.loss_nats_per_token:.3f} | {s.num_exact} of {s.num_checked} "
        f"| {s.num_ended} of {s.num_generated} | {s.mean_answer_tokens:.0f} |"
        for family, s in evaluation.scores.items()
    )
    samples = "\n\n".join(
        f"**{s.family}**, {'right' if s.correct else 'wrong'}\n\n"
        f"````text\n{s.question}\n````\n\n````text\n{s.reply}\n````"
        for s in evaluation.samples
    )
    (folder / "README.md").write_text(CARD.format(rows=rows, samples=samples, **result))


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo target

A Llama-architecture chat model of 7.5 M parameters (16 layers, width 192, 4 query and 2 key/value heads of 64,
vocabulary 2,048, tied embeddings, bfloat16), trained from nothing on procedurally generated conversations. It is the
target that the embedded default of this factory makes draft models for: small enough to ship, deep enough for a
one-layer draft to pay.

## How it was made

| | |
|---|---|
| command | `{command}` |
| hardware, software | {hardware}, torch {torch} |
| corpus | {num_conversations:,} conversations, {corpus_tokens:,} tokens, from `specforge_core/demo/corpus` |
| training | {steps:,} steps, {tokens_seen:,} tokens with padding, {minutes:.1f} minutes |
| last training loss | {final_train_loss:.4f} nats per token |
| model.safetensors | {weights_bytes:,} bytes, sha256 `{weights_sha256}` |

## Held-out problems

No problem below has its facts in the training split: the sha256 of a problem's facts decides the split. Greedy
decoding, at most {max_new_tokens} tokens. "Exact" means that the final answer is right.

| family | loss, nats per token | exact | ended by itself | mean answer tokens |
|---|---|---|---|---|
{rows}

## Limits

It knows the six task families of the corpus, their words and their sizes of numbers, and nothing else: no world
knowledge, no other languages, no open conversation. Outside the corpus it writes fluent nonsense. It is a test object,
not an assistant.

## Samples

{samples}
"""
