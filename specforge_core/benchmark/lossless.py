"""Is the text with a draft the text without? Identical, apart at a near-tie, or really different.

Verification computes several tokens at once, so its logits round differently from those of one token. Where the two
best tokens are closer than that, either may win, and the texts differ from there on without anybody being wrong.
A difference counts as a near-tie only if float32 logits of the same context show it.
"""

import logging
from collections.abc import Sequence
from typing import Literal

import torch

from specforge_core.stages import ResolvedTarget
from specforge_core.targets.hf import HFTarget

logger = logging.getLogger(__name__)

Verdict = Literal["identical", "near_tie", "different"]

RELATIVE_ROUNDING = {"bfloat16": 2 * 2**-7, "float16": 2 * 2**-10, "float32": 128 * 2**-23}
"""Error of a logit over the largest logit, by the dtype of the target.

In 16 bits what counts is the rounding of the hidden states: about two units in the last place after all layers, 0.0165
measured on Llama-3.1-8B in bfloat16. In float32 it is the sums of the matrix products, hundreds of terms long.
"""


class LosslessCheck:
    """Compares greedy answers of one target. A float32 copy of it is loaded when the first difference asks for it."""

    def __init__(self, spec: ResolvedTarget, *, device: str, loaded: HFTarget | None = None) -> None:
        """Args: device: for the copy; loaded: the target as it is there already, which serves if it is in float32."""
        self.spec, self.device = spec, device
        self.reference = loaded if spec.dtype == "float32" else None

    def verdict(self, prompt: Sequence[int], without_draft: Sequence[int], with_draft: Sequence[int]) -> Verdict:
        """How two greedy answers to a prompt (token ids) relate."""
        if list(without_draft) == list(with_draft):
            return "identical"
        first = first_difference(without_draft, with_draft)
        if first == min(len(without_draft), len(with_draft)):
            # One stops where the other goes on: ending is a token too, so no tie explains it.
            return "different"
        context = [*prompt, *without_draft[:first]]
        margin = self.margin(context, without_draft[first], with_draft[first])
        return "near_tie" if margin <= RELATIVE_ROUNDING[self.spec.dtype] else "different"

    @torch.inference_mode()
    def margin(self, context: Sequence[int], token: int, other_token: int) -> float:
        """How far the worse of two next tokens is below the best token of all, over the largest logit in size."""
        if self.reference is None:
            self.reference = self._load()
        input_ids_1T = torch.tensor([list(context)], device=self.reference.device)
        logits_V = self.reference.model(input_ids_1T, use_cache=False, logits_to_keep=1).logits[0, -1]
        worse = torch.minimum(logits_V[token], logits_V[other_token])
        return float((logits_V.max() - worse) / logits_V.abs().max())

    def _load(self) -> HFTarget:
        spec = self.spec.model_copy(update={"dtype": "float32"})
        try:
            return HFTarget(spec, device=self.device)
        except torch.OutOfMemoryError:
            # A few passes over single contexts: slow there, but the measurements are made and must not be lost.
            logger.warning(
                "%s in float32 does not fit on %s: near-ties are looked at on the CPU", spec.model, self.device
            )
            return HFTarget(spec, device="cpu")


def first_difference(tokens: Sequence[int], other_tokens: Sequence[int]) -> int:
    """The first index at which two sequences differ; the shorter one's length if it is a beginning of the other."""
    for i, (token, other_token) in enumerate(zip(tokens, other_tokens, strict=False)):
        if token != other_token:
            return i
    return min(len(tokens), len(other_tokens))
