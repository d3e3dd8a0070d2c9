"""Stage `vocabulary`: the tokens that the draft can propose, the target's most frequent ones. Torch-free arithmetic.

V target vocabulary, Vd draft vocabulary. Source of the map's form: the EAGLE-3 checkpoints that SGLang and vLLM load.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from specforge_core.data.conversations import scan_columns
from specforge_core.draft_limits import check_draft_vocab_size
from specforge_core.facts import Vocabulary
from specforge_core.stages import ResolvedTarget, VocabularySpec

logger = logging.getLogger(__name__)

VOCABULARY_NAME = "vocabulary.safetensors"


class VocabMap(NamedTuple):
    """Which target token each draft token is."""

    d2t: npt.NDArray[np.int64]
    """[Vd], offsets: draft token i is target token i + d2t[i]."""
    t2d: npt.NDArray[np.bool_]
    """[V], True for the target tokens that the draft has."""


def main(spec: VocabularySpec, out: Path) -> Vocabulary:
    """The facts of the vocabulary written to `out`.

    Raises: ValueError for a draft vocabulary larger than the target's, or conversations without supervised tokens.
    """
    counts = supervised_token_counts(spec.conversations, target_vocab_size(spec.target))
    vocab_map = build_vocab_map(counts, draft_vocab_size=spec.draft_vocab_size)
    coverage = float(counts[vocab_map.t2d].sum() / counts.sum())
    save_file(vocab_map._asdict(), out / VOCABULARY_NAME)
    logger.info(
        "%d of %d tokens cover %.3f %% of %d supervised tokens; %d tokens occur",
        spec.draft_vocab_size,
        len(counts),
        100 * coverage,
        counts.sum(),
        np.count_nonzero(counts),
    )
    return Vocabulary(draft_vocab_size=spec.draft_vocab_size, target_vocab_size=len(counts), coverage=coverage)


def build_vocab_map(counts: npt.ArrayLike, *, draft_vocab_size: int) -> VocabMap:
    """The `draft_vocab_size` most frequent tokens, in the order of their ids; of equally frequent ones the lower ids.

    Args: counts: [V], how often each target token occurs.
    Raises: ValueError if there are fewer target tokens than that.
    """
    counts = np.asarray(counts)
    check_draft_vocab_size(draft_vocab_size, len(counts))
    most_frequent = np.argsort(-counts, kind="stable")[:draft_vocab_size]
    t2d = np.zeros(len(counts), dtype=np.bool_)
    t2d[most_frequent] = True
    return VocabMap(np.flatnonzero(t2d) - np.arange(draft_vocab_size), t2d)


def load_vocabulary(directory: Path) -> VocabMap:
    """The map of a vocabulary artifact."""
    return VocabMap(**load_file(directory / VOCABULARY_NAME))


def supervised_token_counts(conversations: Path, vocab_size: int) -> npt.NDArray[np.int64]:
    """int64 [V], how often the target produced each token. Raises: ValueError if it produced none."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in scan_columns(conversations, ["input_ids", "loss_mask"]):
        input_ids, loss_mask = (column.flatten().to_numpy(zero_copy_only=False) for column in batch.columns)
        supervised = input_ids[loss_mask]
        assert supervised.size == 0 or supervised.max() < vocab_size, "a token id outside the target's embedding"
        counts += np.bincount(supervised, minlength=vocab_size)
    if counts.sum() == 0:
        raise ValueError(f"{conversations} has no supervised token; regenerate conversations that have answers")
    return counts


def target_vocab_size(target: ResolvedTarget) -> int:
    """Rows of the target's embedding, which may be more than its tokenizer has tokens."""
    # Also knows the sizes that a config file leaves out, and where a multimodal one keeps its text part.
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(
        target.model, revision=target.revision or "main", trust_remote_code=target.trust_remote_code
    )
    vocab_size: int = config.get_text_config().vocab_size
    return vocab_size
