"""EAGLE-3 by the definition, one number of one slot of one document at a time, in float64.

Shares no code with the trainer and knows neither packing nor vectors over positions. Names as in the paper: x tokens,
m produced-by-the-target marks, a auxiliary states, y last states of the target.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Document(NamedTuple):
    """One conversation, and what the target made of it."""

    x: list[int]
    m: list[bool]
    a: Tensor
    """[tokens, 3, width]"""
    y: Tensor
    """[tokens, width], after the final norm"""


class Shape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float
    fc_norm: bool
    norm_output: bool
    num_steps: int
    decay: float

    @classmethod
    def of(cls, config: dict[str, Any], *, num_steps: int, decay: float = 1.0) -> "Shape":
        """That of a draft's `config.json`."""
        return cls(
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            rope_theta=config["rope_theta"],
            eps=config["rms_norm_eps"],
            fc_norm=config["fc_norm"],
            norm_output=config["norm_output"],
            num_steps=num_steps,
            decay=decay,
        )


class Sums(NamedTuple):
    loss: Tensor
    num_tokens: int
    correct: list[int]
    accepted: list[float]
    valid: list[int]


def rms(v: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean_square = sum(number * number for number in v) / len(v)
    return torch.stack([v[i] / torch.sqrt(mean_square + eps) * weight[i] for i in range(len(v))])


def rotate(v: Tensor, position: int, theta: float) -> Tensor:
    """Pairs (c, c + half) turned by position * theta^(-2c / width)."""
    half = len(v) // 2
    turned = [torch.zeros((), dtype=v.dtype)] * len(v)
    for c in range(half):
        angle = position * theta ** (-2 * c / len(v))
        turned[c] = v[c] * math.cos(angle) - v[c + half] * math.sin(angle)
        turned[c + half] = v[c + half] * math.cos(angle) + v[c] * math.sin(angle)
    return torch.stack(turned)


def is_active(document: Document, slot: int, step: int) -> bool:
    """m[t+1], m[t+2], ..., m[t+2+i] all exist and are all true."""
    wanted = range(slot + 1, slot + 2 + step + 1)
    return wanted[-1] < len(document.x) and all(document.m[u] for u in wanted)


def hidden_states(w: Weights, shape: Shape, embedding: Tensor, document: Document) -> list[list[Tensor]]:
    """Layer outputs by step and slot; a step ends where the document has no token left to read."""
    length, head_dim = len(document.x), shape.head_dim
    group = shape.num_heads // shape.num_kv_heads
    keys: list[list[list[Tensor]]] = []
    values: list[list[list[Tensor]]] = []
    outputs: list[list[Tensor]] = []
    for step in range(shape.num_steps):
        keys.append([])
        values.append([])
        outputs.append([])
        for slot in range(length - 1 - step):
            if step == 0:
                chunks = [document.a[slot, layer] for layer in range(3)]
                if shape.fc_norm:
                    chunks = [rms(chunk, w[f"fc_norm.{i}.weight"], shape.eps) for i, chunk in enumerate(chunks)]
                h = w["fc.weight"] @ torch.cat(chunks)
            else:
                h = outputs[step - 1][slot]
                if shape.norm_output:
                    h = rms(h, w["norm.weight"], shape.eps)
            e = embedding[document.x[slot + 1 + step]]
            n = torch.cat(
                [
                    rms(e, w["midlayer.input_layernorm.weight"], shape.eps),
                    rms(h, w["midlayer.hidden_norm.weight"], shape.eps),
                ]
            )
            q, k, v = (w[f"midlayer.self_attn.{name}_proj.weight"] @ n for name in "qkv")
            position = slot + step
            keys[step].append([])
            values[step].append([])
            for kv_head in range(shape.num_kv_heads):
                part = slice(kv_head * head_dim, (kv_head + 1) * head_dim)
                keys[step][slot].append(rotate(k[part], position, shape.rope_theta))
                values[step][slot].append(v[part])
            heads = []
            for head in range(shape.num_heads):
                query = rotate(q[head * head_dim : (head + 1) * head_dim], position, shape.rope_theta)
                kv_head = head // group
                seen = [(0, s) for s in range(slot + 1)] + [(later, slot) for later in range(1, step + 1)]
                scores = [query @ keys[j][s][kv_head] / math.sqrt(head_dim) for j, s in seen]
                total = sum(torch.exp(score) for score in scores)
                weights = [torch.exp(score) / total for score in scores]
                heads.append(sum(weight * values[j][s][kv_head] for weight, (j, s) in zip(weights, seen, strict=True)))
            h1 = h + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(heads)
            n = rms(h1, w["midlayer.post_attention_layernorm.weight"], shape.eps)
            gate = w["midlayer.mlp.gate_proj.weight"] @ n
            up = w["midlayer.mlp.up_proj.weight"] @ n
            outputs[step].append(h1 + w["midlayer.mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up))
    return outputs


def eagle3(
    w: Weights, shape: Shape, embedding: Tensor, target_head: Tensor, kept: list[int], documents: list[Document]
) -> Sums:
    """Loss and metrics of documents, each on its own. kept: target ids of the draft vocabulary."""
    steps = range(shape.num_steps)
    loss = torch.zeros((), dtype=torch.float64)
    correct, accepted, valid = [0 for _ in steps], [0.0 for _ in steps], [0 for _ in steps]
    for document in documents:
        outputs = hidden_states(w, shape, embedding, document)
        for step in steps:
            for slot in range(len(document.x)):
                if not is_active(document, slot, step):
                    continue
                valid[step] += 1
                target_logits = [float(row @ document.y[slot + 1 + step]) for row in target_head]
                favourite = max(range(len(target_logits)), key=lambda v: target_logits[v])
                if favourite not in kept:
                    continue
                logits = w["lm_head.weight"] @ rms(outputs[step][slot], w["norm.weight"], shape.eps)
                q = torch.exp(logits) / torch.exp(logits).sum()
                mass = sum(math.exp(z) for z in target_logits)
                kept_mass = sum(math.exp(target_logits[v]) for v in kept)
                for i, v in enumerate(kept):
                    p = math.exp(target_logits[v])
                    loss = loss - shape.decay**step * p / kept_mass * torch.log(q[i])
                    accepted[step] += min(q[i].item(), p / mass)
                guess = kept[max(range(len(kept)), key=lambda i: q[i].item())]
                correct[step] += guess == favourite
    return Sums(loss, valid[0], correct, accepted, valid)
