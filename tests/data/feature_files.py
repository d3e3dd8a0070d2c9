"""Feature directories with known values, without a target."""

from collections.abc import Sequence
from pathlib import Path

import torch

from specforge_core.data.shards import Document, FeatureIndex, FeatureWriter, plan_shards
from specforge_core.targets import TargetFeatures

INDEX = FeatureIndex(layers=(1, 3), hidden_size=4, dtype="bfloat16")


def make_document(number: int, length: int) -> Document:
    """Token t of document n is 100 n + t; every third token is a prompt's."""
    tokens_T = torch.arange(length)
    return Document(f"document-{number}", 100 * number + tokens_T, tokens_T % 3 != 0)


def make_features(number: int, length: int) -> TargetFeatures:
    """Random, by the document's number."""
    generator = torch.Generator().manual_seed(number)
    return TargetFeatures(
        aux_hidden_TLD=torch.randn(length, 2, 4, generator=generator),
        last_hidden_TD=torch.randn(length, 4, generator=generator),
        argmax_T=torch.randint(0, 1000, (length,), generator=generator, dtype=torch.int32),
        logsumexp_T=torch.randn(length, generator=generator),
    )


def write_features(directory: Path, lengths: Sequence[int], *, tokens_per_shard: int) -> None:
    """A directory of documents numbered from 0."""
    writer = FeatureWriter(directory, INDEX)
    for shard in plan_shards(lengths, tokens_per_shard):
        writer.write([make_document(i, lengths[i]) for i in shard], [make_features(i, lengths[i]) for i in shard])
