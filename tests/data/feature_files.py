"""Feature directories with known values, without a target."""

from collections.abc import Sequence
from pathlib import Path

import torch

from specforge_core.artifacts import file_sha256
from specforge_core.data.shards import Document, FeatureIndex, FeatureWriter, load_index, plan_shards
from specforge_core.targets import TargetFeatures

INDEX = FeatureIndex(layers=(1, 3), hidden_size=4, dtype="bfloat16")


def make_document(number: int, length: int) -> Document:
    """Token t of document n is 100 n + t; every third token is a prompt's."""
    tokens_T = torch.arange(length)
    return Document(f"document-{number}", 100 * number + tokens_T, tokens_T % 3 != 0)


def teaching(length: int) -> list[int]:
    """The tokens of such a document that teach: those before another one that is no prompt's."""
    return [t for t in range(length - 1) if (t + 1) % 3 != 0]


def make_features(number: int, length: int) -> TargetFeatures:
    """Random, by the document's number."""
    generator = torch.Generator().manual_seed(number)
    num_teaching = len(teaching(length))
    return TargetFeatures(
        aux_hidden_TLD=torch.randn(length, 2, 4, generator=generator),
        last_hidden_UD=torch.randn(num_teaching, 4, generator=generator),
        argmax_U=torch.randint(0, 1000, (num_teaching,), generator=generator, dtype=torch.int32),
        logsumexp_U=torch.randn(num_teaching, generator=generator),
    )


def write_features(
    directory: Path, lengths: Sequence[int], *, tokens_per_shard: int, index: FeatureIndex = INDEX
) -> None:
    """A directory of documents numbered from 0."""
    writer = FeatureWriter(directory, index)
    for shard in plan_shards(lengths, tokens_per_shard):
        writer.write([make_document(i, lengths[i]) for i in shard], [make_features(i, lengths[i]) for i in shard])


def damaged_shards(directory: Path) -> list[str]:
    """Names of shards whose content is not what the index says was written."""
    shards = load_index(directory).shards
    return [shard.name for shard in shards if file_sha256(directory / shard.name) != shard.sha256]
