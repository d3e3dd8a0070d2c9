"""Measures what a token's features take on the disk, by writing some.

    python -m specforge_core.training.bench.stored_bytes

Random features of real lengths go through the writer of `capture`; sizes do not depend on the values.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from specforge_core.artifacts import write_result
from specforge_core.benchmark.tables import markdown_table
from specforge_core.data.shards import load_index
from specforge_core.environment import environment
from specforge_core.facts import Environment, Record
from specforge_core.manifest_sections import FeatureDtype
from specforge_core.training.bench.disk import write_features
from specforge_core.training.bench.lengths import Lengths
from specforge_core.training.bench.shapes import SHAPES, Shape
from specforge_core.training.bench.workload import make_workload

KIB, TB = 2**10, 1e12
DTYPES: tuple[FeatureDtype, ...] = ("bfloat16", "float8")
SHARES = (0.2, 0.5, 1.0)
NUM_TOKENS = 8192
SEED = 0
PUBLIC_TOKENS = 40 * TB / (32 * KIB)
"""Of the public SpecBundle's 1.4 million conversations: what their features take, by what a token takes."""
STEM = "stored-bytes"


class StoredRow(Record):
    """Documents that were written."""

    dtype: FeatureDtype
    num_tokens: int
    num_loss_tokens: int
    stored_bytes: int
    """Of the shards, tables and headers included."""

    @property
    def bytes_per_token(self) -> float:
        return self.stored_bytes / self.num_tokens


class StoredBytes(Record):
    """A run."""

    environment: Environment
    shape: str
    width: int
    rows: tuple[StoredRow, ...]


def measured_rows(shape: Shape, num_tokens: int) -> Iterator[StoredRow]:
    """A row for each dtype and share of answers."""
    for dtype in DTYPES:
        for share in SHARES:
            lengths: Lengths = "uniform" if share == 1.0 else "real"
            work = make_workload(lengths, share, budget=num_tokens, document_tokens=num_tokens // 4, seed=SEED)
            with tempfile.TemporaryDirectory() as name:
                write_features(Path(name), shape, work.packed, device=torch.device("cpu"), dtype=dtype)
                (shard,) = load_index(Path(name)).shards
            yield StoredRow(
                dtype=dtype,
                num_tokens=shard.num_tokens,
                num_loss_tokens=shard.num_loss_tokens,
                stored_bytes=shard.size_bytes,
            )


def markdown(result: StoredBytes) -> str:
    """The result for people."""
    made_on = result.environment
    cells = [
        {
            "features.dtype": row.dtype,
            "supervised": f"{row.num_loss_tokens / row.num_tokens:.0%}",
            "tokens": f"{row.num_tokens:,}",
            "KiB a token": f"{row.bytes_per_token / KIB:.2f}",
            "1.4 M conversations, TB": f"{row.bytes_per_token * PUBLIC_TOKENS / TB:.1f}",
        }
        for row in result.rows
    ]
    return "\n".join(
        [
            "# What features take on the disk",
            "",
            f"The target of {result.shape}, {result.width:,} wide: three captured layers of every token, the last "
            "hidden state where a token teaches. The public trainers store four layers of every token in bfloat16, "
            "32 KiB; their 1.4 million conversations, about 40 TB so, are the last column.",
            "",
            markdown_table(cells),
            "",
            f"specbundle {made_on.versions['specbundle']}, torch {made_on.versions['torch']}; commit {made_on.commit}.",
            "",
            "```",
            made_on.command,
            "```",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """0."""
    parser = argparse.ArgumentParser(prog="python -m specforge_core.training.bench.stored_bytes", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="of each row; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("reports/training"))
    arguments = parser.parse_args(argv)
    shape = SHAPES[arguments.shape]
    result = StoredBytes(
        environment=environment(num_threads=torch.get_num_threads(), gpu=None),
        shape=arguments.shape,
        width=shape.width,
        rows=tuple(measured_rows(shape, arguments.tokens)),
    )
    write_result(arguments.out, STEM, result, text := markdown(result))
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
