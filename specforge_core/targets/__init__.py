"""What a target model is to the factory: something that generates, and something whose hidden states can be captured.

"Layer i" always means the OUTPUT of decoder layer i, counted from 0: the residual stream after that layer, before any
later norm. T tokens of one document, U teaching tokens of it, L captured layers, D target width.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

FinishReason = Literal["stop", "length"]


class Sampling(NamedTuple):
    """How tokens are chosen. temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    """With the request's id it seeds that request's own stream, so a result does not depend on its batch."""


class GenerationRequest(NamedTuple):
    """A prompt as token ids, with an id that the completion carries too."""

    id: str
    input_ids: Sequence[int]


class Completion(NamedTuple):
    """What the target answered: new tokens only, its end-of-turn token included when it stopped by itself."""

    id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class Refusal(NamedTuple):
    """A request that the target did not answer, while it goes on answering others."""

    id: str
    reason: str


class CaptureRequest(NamedTuple):
    """A document to be read by the target."""

    input_ids_T: Tensor
    """int64"""
    is_teaching_T: Tensor
    """bool, the tokens whose last hidden state is wanted."""


class TargetFeatures(NamedTuple):
    """What training reads of one document."""

    aux_hidden_TLD: Tensor
    last_hidden_UD: Tensor
    """After the final norm."""
    argmax_U: Tensor
    """int32, greedy next token over the full vocabulary."""
    logsumexp_U: Tensor
    """float32, of the logits over the full vocabulary."""


class TargetBackend(Protocol):
    """What generates: a target in this process (`hf.py`), or behind servers (`sglang.py`)."""

    def generate(
        self, requests: Iterable[GenerationRequest], sampling: Sampling, *, batch_size: int
    ) -> Iterator[Completion | Refusal]:
        """Completions in the order in which they finish.

        `requests` is read where there is room, and read again after its end while others are being answered: what the
        caller does with an answer may be what brings the next request in.
        """
        ...
