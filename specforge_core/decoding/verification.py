"""From the target's logits and a proposed chain to what is kept of it, greedily or by rejection sampling.

A drafter proposes one chain of K tokens a row, without probabilities: its distribution q is a point mass. Then
speculative sampling (arXiv 2211.17192, section 2.3) accepts token d with probability min(1, p(d) / q(d)) = p(d), and
draws from p without d otherwise. What comes out is distributed as p, whatever was proposed.

B rows, K proposed tokens, T = K + 1 positions, V target vocabulary.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """What one row keeps: the first proposed tokens, and then the target's own."""

    num_accepted: int
    next_token: int


def greedy_verdicts(logits_BTV: Tensor, draft_ids: Sequence[Sequence[int]]) -> list[Verdict]:
    """Per row the longest chain that the target would have written itself. With K = 0 this is greedy decoding."""
    verdicts = []
    for target_ids, row_draft_ids in zip(logits_BTV.argmax(dim=-1).tolist(), draft_ids, strict=True):
        num_accepted = 0
        while num_accepted < len(row_draft_ids) and row_draft_ids[num_accepted] == target_ids[num_accepted]:
            num_accepted += 1
        verdicts.append(Verdict(num_accepted, target_ids[num_accepted]))
    return verdicts


def target_probabilities(logits_BTV: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """The distribution that tokens are drawn from: float32 [B, T, V], cut to the smallest set that holds `top_p`."""
    probabilities_BTV = (logits_BTV.float() / temperature).softmax(dim=-1)
    if top_p == 1.0:
        return probabilities_BTV
    sorted_BTV, order_BTV = probabilities_BTV.sort(dim=-1, descending=True)
    is_cut_BTV = sorted_BTV.cumsum(dim=-1) - sorted_BTV >= top_p
    kept_BTV = probabilities_BTV.scatter(-1, order_BTV, sorted_BTV.masked_fill(is_cut_BTV, 0.0))
    return kept_BTV / kept_BTV.sum(dim=-1, keepdim=True)


def sampled_verdicts(
    probabilities_BTV: Tensor, draft_ids: Sequence[Sequence[int]], randoms: Sequence[Random]
) -> list[Verdict]:
    """Per row what rejection sampling keeps. With K = 0 this is sampling from the target.

    Args: randoms: one stream a row; each gives one number for every proposed token looked at, and one for the last.
    """
    device = probabilities_BTV.device
    rows_B = torch.arange(len(draft_ids), device=device)
    draft_ids_BK = torch.tensor(draft_ids, dtype=torch.int64, device=device)
    accept_probabilities = probabilities_BTV[:, :-1].gather(-1, draft_ids_BK[..., None])[..., 0].tolist()
    num_accepted = []
    for row_probabilities, random in zip(accept_probabilities, randoms, strict=True):
        kept = 0
        while kept < len(row_probabilities) and random.random() < row_probabilities[kept]:
            kept += 1
        num_accepted.append(kept)
    # float64, so that the running sum over a large vocabulary stays monotonic to well below one token's probability.
    last_BV = probabilities_BTV[rows_B, torch.tensor(num_accepted, device=device)].double()
    for row, (kept, row_draft_ids) in enumerate(zip(num_accepted, draft_ids, strict=True)):
        if kept < len(row_draft_ids):
            last_BV[row, row_draft_ids[kept]] = 0.0
    cumulative_BV = last_BV.cumsum(dim=-1)
    uniform_B1 = torch.tensor([[random.random()] for random in randoms], dtype=torch.float64, device=device)
    next_ids = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)[:, 0].tolist()
    return [Verdict(*pair) for pair in zip(num_accepted, next_ids, strict=True)]
