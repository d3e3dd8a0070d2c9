"""Documents to train on: all of one length, or drawn from real conversations, with a wanted share of supervised tokens.

Shipped are only the lengths of the real conversations; `make_lengths.py` made them and says how. Torch-free.
"""

import gzip
from collections.abc import Sequence
from importlib.resources import files
from typing import Literal, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from specforge_core.facts import Record

LENGTHS_NAME = "lengths.json.gz"
Lengths = Literal["uniform", "real"]

SHARE_TOLERANCE_TOKENS = 1e-6


class Turn(NamedTuple):
    """A prompt and its answer, in tokens."""

    prompt: int
    answer: int


Conversation = tuple[Turn, ...]


class RealLengths(Record):
    """Lengths of real conversations."""

    bytes_per_token: float
    prompt_overhead_tokens: int
    answer_overhead_tokens: int
    sources: dict[str, tuple[Conversation, ...]]

    @property
    def conversations(self) -> list[Conversation]:
        """Those of all sources."""
        return [conversation for source in self.sources.values() for conversation in source]


def load_real_lengths() -> RealLengths:
    """The lengths that ship with the package."""
    content = (files(__package__) / LENGTHS_NAME).read_bytes()
    return TypeAdapter(RealLengths).validate_json(gzip.decompress(content))


def count_tokens(conversation: Conversation) -> int:
    """Tokens of prompts and answers."""
    return sum(turn.prompt + turn.answer for turn in conversation)


def count_answer_tokens(conversation: Conversation) -> int:
    """Tokens of answers."""
    return sum(turn.answer for turn in conversation)


def draw_conversations(
    lengths: Lengths, share: float, *, num_tokens: int, max_tokens: int, document_tokens: int, seed: int
) -> list[Conversation]:
    """Conversations of about `num_tokens` together, none longer than `max_tokens`.

    Args: document_tokens: of each, if lengths are uniform: one answer ends it.
    Raises: ValueError if no weights of the real conversations reach `share`.
    """
    if lengths == "uniform":
        length = min(document_tokens, max_tokens)
        answer = round(share * length)
        conversation: Conversation = (Turn(length - answer, answer),)
        return [conversation] * (num_tokens // length)
    conversations = [c for c in load_real_lengths().conversations if count_tokens(c) <= max_tokens]
    weights = tilted_weights(conversations, share)
    mean_tokens = float(weights @ [count_tokens(conversation) for conversation in conversations])
    count = max(1, round(num_tokens / mean_tokens))
    chosen = np.random.default_rng(seed).choice(len(conversations), size=count, p=weights)
    return [conversations[i] for i in chosen]


def tilted_weights(conversations: Sequence[Conversation], share: float) -> np.ndarray:
    """Probabilities under which `share` of the tokens drawn are in answers: the exponential tilt towards it.

    Weights are exp(lambda * (answer - share * total)), the distribution nearest to the given one (in Kullback-Leibler
    divergence) whose mean of answer - share * total is zero. So each length stays a real one.
    Raises: ValueError if all conversations lie on one side of `share`.
    """
    excess = np.array([count_answer_tokens(c) - share * count_tokens(c) for c in conversations])
    if not excess.min() < 0 < excess.max():
        shares = [count_answer_tokens(c) / count_tokens(c) for c in conversations]
        raise ValueError(
            f"share={share} cannot be drawn from conversations whose answers have {min(shares):.3f} to "
            f"{max(shares):.3f} of the tokens; choose one between, or uniform lengths"
        )

    def weights(tilt: float) -> np.ndarray:
        exponent = tilt * excess
        weight = np.exp(exponent - exponent.max())
        return weight / weight.sum()

    # The mean rises with the tilt, from the lowest to the highest excess.
    low, high = -1.0, 1.0
    while weights(low) @ excess > 0:
        low *= 2
    while weights(high) @ excess < 0:
        high *= 2
    while high - low > 1e-12 * max(1.0, abs(low), abs(high)):
        tilt = (low + high) / 2
        mean = float(weights(tilt) @ excess)
        if abs(mean) < SHARE_TOLERANCE_TOKENS:
            break
        low, high = (tilt, high) if mean < 0 else (low, tilt)
    return weights((low + high) / 2)
