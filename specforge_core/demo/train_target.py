"""Train the small target model of the embedded default from nothing: tokenizer, corpus, weights, evaluation, card.

    python -m specforge_core.demo.train_target --out target --data corpus --minutes 8 --conversations 2000000

Tensor names: B rows, T tokens of a row, D model width, V vocabulary.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from specforge_core.demo.target_card import evaluate_target, write_card
from specforge_core.demo.target_data import (
    MAX_POSITIONS,
    TokenizedCorpus,
    build_corpus,
    load_tokenizer,
    train_tokenizer,
)

logger = logging.getLogger(__name__)

# Row lengths a batch can have: few, so that each is compiled once; close, so that little is padding.
BUCKETS = (96, 128, 160, 208, 288, 512)
# A little weight on what users write: enough to learn the words, too little to spend capacity on predicting questions.
PROMPT_WEIGHT = 0.03
MUON_LR, MUON_MOMENTUM, MUON_WEIGHT_DECAY = 0.02, 0.95, 0.05
ADAM_LR = 2e-3
WARMUP_SHARE, DECAY_SHARE = 0.02, 0.5
CHECKPOINT_EVERY_S = 120.0


class Size(NamedTuple):
    """A Llama; its heads are 64 wide."""

    width: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int


DEMO = Size(192, 16, 512, 4, 2)
"""7.5 M parameters: narrow and deep, because a draft gains by the target's depth."""


class Plan(NamedTuple):
    """How much to train: wall clock, rows of data, tokens a micro-batch and micro-batches a step."""

    minutes: float
    num_conversations: int
    micro_batch_tokens: int
    num_micro_batches: int
    num_eval_prompts: int
    max_new_tokens: int
    compiles: bool = True
    """On a GPU; it takes a minute or two that the wall clock does not count."""


FULL = Plan(8.0, 3_000_000, 65_536, 2, 192, 320)
SMOKE = Plan(0.4, 1_500, 2_560, 1, 4, 40)


class Batch(NamedTuple):
    """Rows of one bucket; `weight_BT` is the weight of predicting `target_BT`."""

    input_BT: Tensor
    target_BT: Tensor
    weight_BT: Tensor


class TrainingTotals(NamedTuple):
    """What a finished run has done."""

    steps: int
    tokens_seen: int
    minutes: float
    final_train_loss: float


def new_model(tokenizer: PreTrainedTokenizerBase, size: Size) -> LlamaForCausalLM:
    """A fresh model for that tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        num_hidden_layers=size.num_layers,
        intermediate_size=size.intermediate_size,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=10_000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    corpus: TokenizedCorpus, *, micro_batch_tokens: int, pad_id: int, seed: int, device: torch.device
) -> Iterator[Batch]:
    """Endless batches of fixed shapes, buckets in proportion to the tokens in them. The corpus lives on the device."""
    tokens_N = torch.from_numpy(corpus.tokens_N.astype(np.int16)).to(device)
    loss_N = torch.from_numpy(np.array(corpus.loss_N)).to(device)
    lengths_R = np.diff(corpus.starts_R1)
    # A row of T inputs has T + 1 tokens.
    bucket_R = np.searchsorted(np.array(BUCKETS) + 1, lengths_R)
    rows_of = [np.flatnonzero(bucket_R == bucket) for bucket in range(len(BUCKETS))]
    logger.info(
        "bucket sizes %s hold %s rows; %d rows too long",
        BUCKETS,
        [len(r) for r in rows_of],
        (bucket_R == len(BUCKETS)).sum(),
    )
    padded = np.array([len(rows) * size for rows, size in zip(rows_of, BUCKETS, strict=True)], dtype=float)
    logger.info(
        "%.1f M tokens, %.0f%% of the batches is padding", len(tokens_N) / 1e6, 100 - 100 * len(tokens_N) / padded.sum()
    )
    rng = np.random.default_rng(seed)
    starts_R = torch.from_numpy(corpus.starts_R1[:-1].astype(np.int64)).to(device)
    length_R = torch.from_numpy(lengths_R.astype(np.int64)).to(device)
    # Row numbers are shuffled where they are used: a copy from the host would wait for all queued work.
    rows_on_device = [torch.from_numpy(rows).to(device) for rows in rows_of]
    queues = [rows[:0] for rows in rows_on_device]
    while True:
        bucket = int(rng.choice(len(BUCKETS), p=padded / padded.sum()))
        num_rows = max(micro_batch_tokens // BUCKETS[bucket], 1)
        while len(queues[bucket]) < num_rows:
            rows = rows_on_device[bucket]
            queues[bucket] = torch.cat([queues[bucket], rows[torch.randperm(len(rows), device=device)]])
        rows_B, queues[bucket] = queues[bucket][:num_rows], queues[bucket][num_rows:]
        offset_T = torch.arange(BUCKETS[bucket] + 1, device=device)
        valid_BT = offset_T < length_R[rows_B][:, None]
        index_BT = (starts_R[rows_B][:, None] + offset_T).clamp(max=len(tokens_N) - 1)
        ids_BT = torch.where(valid_BT, tokens_N[index_BT].long(), pad_id)
        weight_BT = torch.where(loss_N[index_BT], 1.0, PROMPT_WEIGHT) * valid_BT
        yield Batch(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous(), weight_BT[:, 1:].contiguous())


def layer_output(layer: nn.Module, hidden_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """One decoder layer with plain causal attention. No mask: rows start at 0 and padding comes last."""
    return layer(hidden_BTD, attention_mask=None, position_embeddings=rope)


def weighted_loss_sum(hidden_BTD: Tensor, head_VD: Tensor, target_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """Sum of the weighted cross-entropies in nats, float32."""
    logits = F.linear(hidden_BTD, head_VD).float()
    losses = F.cross_entropy(logits.flatten(0, 1), target_BT.flatten(), reduction="none")
    return (losses * weight_BT.flatten()).sum()


class Compute(NamedTuple):
    """The two functions worth compiling. One layer, not the model, is compiled: all layers share its code."""

    layer: Callable[[nn.Module, Tensor, tuple[Tensor, Tensor]], Tensor]
    loss_sum: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    dtype: torch.dtype


def batch_loss_sum(model: LlamaForCausalLM, batch: Batch, compute: Compute) -> Tensor:
    """The weighted loss of a batch, summed; the mask code of transformers is left out on purpose."""
    hidden_BTD = model.model.embed_tokens(batch.input_BT).to(compute.dtype)
    position_1T = torch.arange(batch.input_BT.shape[1], device=hidden_BTD.device)[None]
    rope = model.model.rotary_emb(hidden_BTD, position_1T)
    for layer in model.model.layers:
        hidden_BTD = compute.layer(layer, hidden_BTD, rope)
    hidden_BTD = model.model.norm(hidden_BTD)
    return compute.loss_sum(hidden_BTD, model.lm_head.weight, batch.target_BT, batch.weight_BT)


def optimizers(model: LlamaForCausalLM, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda")
    muon = torch.optim.Muon(matrices, lr=MUON_LR, momentum=MUON_MOMENTUM, weight_decay=MUON_WEIGHT_DECAY)
    return [muon, adam]


def lr_factor(progress: float) -> float:
    """Warm up, hold, then fall linearly to 0 at the end of the time budget."""
    return max(0.0, min(1.0, progress / WARMUP_SHARE, (1.0 - progress) / DECAY_SHARE))


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights in bfloat16; the folder then loads with `from_pretrained`."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    copy.to(torch.bfloat16).save_pretrained(out)


def train(model: LlamaForCausalLM, corpus: TokenizedCorpus, plan: Plan, *, seed: int, out: Path) -> TrainingTotals:
    """Train for the plan's minutes; compiling each shape is not counted. Weights are saved on the way."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    compute = Compute(layer_output, weighted_loss_sum, torch.bfloat16 if on_gpu else torch.float32)
    is_compiled = on_gpu and plan.compiles
    if is_compiled:
        torch._dynamo.config.recompile_limit = 128
        compute = Compute(
            torch.compile(layer_output, dynamic=False), torch.compile(weighted_loss_sum, dynamic=False), compute.dtype
        )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    pad_id = model.config.pad_token_id
    stream = batches(corpus, micro_batch_tokens=plan.micro_batch_tokens, pad_id=pad_id, seed=seed, device=device)
    if is_compiled:
        warm_up(model, stream, compute, autocast)
    stepping = optimizers(model, device)
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in stepping]
    budget_s, started = plan.minutes * 60, time.monotonic()
    steps, tokens_seen, last_saved, loss_value = 0, 0, started, math.nan
    while (elapsed := time.monotonic() - started) < budget_s:
        for optimizer, lrs in zip(stepping, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * lr_factor(elapsed / budget_s)
        micro = [next(stream) for _ in range(plan.num_micro_batches)]
        weight = torch.stack([batch.weight_BT.sum() for batch in micro]).sum()
        loss = torch.zeros((), device=device)
        for batch in micro:
            with autocast:
                part = batch_loss_sum(model, batch, compute) / weight
            part.backward()
            loss += part.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in stepping:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        steps += 1
        tokens_seen += sum(batch.input_BT.numel() for batch in micro)
        if steps % 20 == 0:
            # Reading the loss waits for the GPU, so that the clock measures work done and not work queued.
            loss_value = loss.item()
        if steps % 100 == 0:
            elapsed = time.monotonic() - started
            logger.info(
                "step %d  loss %.4f  lr x%.2f  %.0f k tokens/s  %.0f M tokens  %.0f s left",
                steps, loss_value, lr_factor(elapsed / budget_s),
                tokens_seen / elapsed / 1e3, tokens_seen / 1e6, budget_s - elapsed,
            )  # fmt: skip
        if time.monotonic() - last_saved > CHECKPOINT_EVERY_S:
            save_model(model, out)
            last_saved = time.monotonic()
    loss_value = loss.item()
    minutes = (time.monotonic() - started) / 60
    save_model(model, out)
    return TrainingTotals(steps, tokens_seen, minutes, loss_value)


def warm_up(model: LlamaForCausalLM, stream: Iterator[Batch], compute: Compute, autocast: torch.autocast) -> None:
    """Run every bucket's shape once, forward and backward, so that compilation is over before the clock starts."""
    started, seen = time.monotonic(), set()
    for batch in stream:
        if batch.input_BT.shape not in seen:
            seen.add(batch.input_BT.shape)
            with autocast:
                loss = batch_loss_sum(model, batch, compute)
            loss.backward()
            logger.info("compiled %s after %.0f s", tuple(batch.input_BT.shape), time.monotonic() - started)
        if len(seen) == len(BUCKETS):
            break
    model.zero_grad(set_to_none=True)


def repeatable_command(args: argparse.Namespace, plan: Plan) -> str:
    """The command that repeats this run. Folders get generic names: a card is public, a machine's paths are not."""
    return (
        "python -m specforge_core.demo.train_target --out target --data corpus"
        f" --minutes {plan.minutes:g} --conversations {plan.num_conversations} --device {args.device}"
        f" --seed {args.seed}{' --smoke' if args.smoke else ''}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo target from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--data", type=Path, required=True, help="folder that keeps the tokenized corpus between runs")
    parser.add_argument("--minutes", type=float, help="wall clock for training alone")
    parser.add_argument("--conversations", type=int, help="conversations to generate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute on a CPU: everything runs, nothing is learned")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    args = parse_arguments()
    plan = SMOKE if args.smoke else FULL
    plan = plan._replace(
        minutes=args.minutes or plan.minutes, num_conversations=args.conversations or plan.num_conversations
    )
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    train_tokenizer(args.out)
    tokenizer = load_tokenizer(args.out)
    logger.info("tokenizer of %d tokens written", len(tokenizer))
    corpus = build_corpus(args.out, args.data, num_conversations=plan.num_conversations, seed=args.seed)
    model = new_model(tokenizer, DEMO).to(args.device)
    logger.info("%.2f M parameters on %s", sum(p.numel() for p in model.parameters()) / 1e6, args.device)
    totals = train(model, corpus, plan, seed=args.seed, out=args.out)
    logger.info("trained: %s", totals)
    evaluation = evaluate_target(
        args.out, device=args.device, num_prompts=plan.num_eval_prompts, max_new_tokens=plan.max_new_tokens
    )
    run = {
        "command": repeatable_command(args, plan),
        "hardware": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "num_conversations": len(corpus.starts_R1) - 1,
        "corpus_tokens": int(corpus.starts_R1[-1]),
        **totals._asdict(),
    }
    write_card(args.out, run, evaluation)
    logger.info("%s", json.dumps({family: score._asdict() for family, score in evaluation.scores.items()}, indent=1))


if __name__ == "__main__":
    main()
