"""How good a draft is on held-out conversations: by its loss, and by a speculative loop.

T tokens of a packed batch, K draft positions.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from specforge_core.drafts.base import DraftBatch, DraftLoss, DraftModel
from specforge_core.training.metrics import loss_metrics
from specforge_core.training.workers import Workers

CHAIN_LENGTH = 3
"""Tokens drafted at once by the speculative loop: the usual chain of SGLang, 3 steps and 4 draft tokens."""


class Evaluation(NamedTuple):
    """Sums over held-out conversations."""

    losses: DraftLoss
    num_output_tokens: float
    num_verify_steps: float

    @property
    def acceptance_length(self) -> float:
        """Output tokens per verification step, as `specforge_core.artifacts.Measurement` counts them.

        Raises: ValueError if no answer has the two tokens that a verification step needs.
        """
        if not self.num_verify_steps:
            raise ValueError(
                "no held-out answer has two tokens, so nothing can be evaluated; "
                "raise training.eval_fraction or add data"
            )
        return self.num_output_tokens / self.num_verify_steps

    def metrics(self) -> dict[str, float]:
        """For `metrics.jsonl`."""
        return {**loss_metrics(self.losses, "eval"), "eval/acceptance_length": self.acceptance_length}


@torch.no_grad()
def evaluate(draft: DraftModel, batches: Iterable[DraftBatch], workers: Workers) -> Evaluation:
    """The evaluation over the prepared batches of all replicas; each replica gives its own share.

    The speculative loop needs no target, because the target's answers are the data. A chain drafted from slot t is
    verified against the tokens that follow; the first wrong one is replaced by the data's, and the next chain starts
    behind it. For greedy data this is what a served chain accepts, token for token. For sampled data it is one sample
    of it: a drafted token is accepted with the target's probability, which is how often the sampled token equals it.
    """
    losses = DraftLoss.zero(draft.num_positions, workers.device)
    num_output_tokens = num_verify_steps = 0
    for batch in batches:
        losses = losses.plus(draft(batch))
        accepted = accepted_tokens(draft.greedy_chains(batch, CHAIN_LENGTH), batch).tolist()
        for answer in answers(batch) if workers.leads_replica else ():
            num_output_tokens += len(answer)
            num_verify_steps += verify_steps(answer, accepted)
    loop_counts = torch.tensor([num_output_tokens, num_verify_steps], dtype=torch.float64, device=workers.device)
    workers.add_up([*losses, loop_counts])
    return Evaluation(losses, *loop_counts.tolist())


def accepted_tokens(chain_KT: Tensor, batch: DraftBatch) -> Tensor:
    """int64 [T]: how many tokens of the chain drafted from slot t are the answer's, up to the first that is not."""
    is_right = []
    for k, drafted_T in enumerate(chain_KT):
        shift = 2 + k
        follows_T = torch.zeros_like(batch.loss_mask_T)
        follows_T[:-shift] = (
            (drafted_T[:-shift] == batch.input_ids_T[shift:])
            & batch.loss_mask_T[shift:]
            & (batch.document_ids_T[shift:] == batch.document_ids_T[:-shift])
        )
        is_right.append(follows_T)
    return torch.stack(is_right).long().cumprod(0).sum(0)


def answers(batch: DraftBatch) -> list[range]:
    """The token indices of each answer: an unbroken run of the target's tokens in one document."""
    run_T = torch.where(batch.loss_mask_T & (batch.document_ids_T >= 0), batch.document_ids_T, -1)
    values, lengths = run_T.unique_consecutive(return_counts=True)
    stops = lengths.cumsum(0).tolist()
    return [
        range(stop - length, stop)
        for value, length, stop in zip(values.tolist(), lengths.tolist(), stops, strict=True)
        if value >= 0
    ]


def verify_steps(answer: range, accepted: list[int]) -> int:
    """Verification steps that write an answer, its first token coming from the prompt's forward pass.

    Args: accepted: by slot, tokens accepted of the chain drafted there.
    """
    num_steps, last_known = 0, answer[0]
    while last_known < answer[-1]:
        # The chain of slot t follows token t + 1; verification adds one token of the target's own. An answer without a
        # token before it has no slot: then the row before belongs to another document, and nothing of it is accepted.
        last_known += accepted[last_known - 1] + 1
        num_steps += 1
    return num_steps
