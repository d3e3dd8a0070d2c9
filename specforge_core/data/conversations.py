"""Regenerated conversations on disk: Parquet shards, one row for each conversation. Torch-free."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from specforge_core.data.prompts import Message

if TYPE_CHECKING:
    from datasets import Dataset

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("finish_reasons", pa.list_(pa.string())),
    ]
)
SHARD_GLOB = "conversations-*.parquet"
CONVERSATIONS_PER_SHARD = 4096
CONVERSATIONS_PER_READ = 1024
"""Rows decoded at once when a shard is scanned."""


class Conversation(NamedTuple):
    """A conversation whose every answer is the target's own. T tokens of the whole conversation."""

    id: str
    source: str
    messages: tuple[Message, ...]
    """For people; the token ids are what counts."""
    input_ids: tuple[int, ...]
    """[T], in the target's vocabulary."""
    loss_mask: tuple[bool, ...]
    """[T], True where this token was produced by the target, its end-of-turn tokens included."""
    finish_reasons: tuple[str, ...]
    """`stop` or `length`, one an answer."""


class ConversationCounts(NamedTuple):
    """Sums over stored conversations; tokens are the target's."""

    num_conversations: int
    num_tokens: int
    num_loss_tokens: int
    num_cut_off: int
    """Conversations whose last answer reached the limit of new tokens."""


def write_conversations(directory: Path, conversations: Iterable[Conversation]) -> ConversationCounts:
    """Write Parquet shards in the order given, in place of any others; equal conversations give equal bytes."""
    for path in directory.glob(SHARD_GLOB):
        path.unlink()
    counts = dict.fromkeys(ConversationCounts._fields, 0)
    remaining = iter(conversations)
    shards = iter(lambda: list(islice(remaining, CONVERSATIONS_PER_SHARD)), [])
    for shard, rows in enumerate(shards):
        table = pa.Table.from_pylist([row._asdict() for row in rows], schema=SCHEMA)
        pq.write_table(table, directory / f"conversations-{shard:05d}.parquet")
        counts["num_conversations"] += len(rows)
        counts["num_tokens"] += sum(len(row.input_ids) for row in rows)
        counts["num_loss_tokens"] += sum(sum(row.loss_mask) for row in rows)
        counts["num_cut_off"] += sum(row.finish_reasons[-1] == "length" for row in rows)
    return ConversationCounts(**counts)


def conversation_shards(directory: Path) -> list[Path]:
    """The Parquet files of an artifact, in order. Raises: FileNotFoundError if there are none."""
    shards = sorted(directory.glob(SHARD_GLOB))
    if not shards:
        raise FileNotFoundError(f"{directory} holds no {SHARD_GLOB}; build it with the stage `regenerate`")
    return shards


def scan_columns(directory: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of all conversations in order, CONVERSATIONS_PER_READ rows at a time."""
    for path in conversation_shards(directory):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=CONVERSATIONS_PER_READ, columns=columns)


def load_conversations(directory: Path) -> "Dataset":
    """The conversations of an artifact as a memory-mapped data set, with the columns of `Conversation`."""
    from datasets import Dataset

    return Dataset.from_parquet([str(path) for path in conversation_shards(directory)])
