"""What features take on the disk, against sizes by hand."""

from pathlib import Path

import pytest

from specforge_core.training.bench import stored_bytes
from specforge_core.training.bench.stored_bytes import StoredBytes, measured_rows

HEADER_BYTES = 2000
"""At most: names, shapes and offsets of the tensors, and the ids of the documents."""


def test_a_token_takes_three_layers_and_a_teacher_where_it_teaches() -> None:
    shape = stored_bytes.SHAPES["tiny"]
    for row in measured_rows(shape, num_tokens=512):
        vector = shape.width * 2 if row.dtype == "bfloat16" else shape.width + 4
        # An id of 4 bytes and a bit of the mask in a byte; the target's favourite and its log-sum-exp.
        by_hand = row.num_tokens * (3 * vector + 5) + row.num_loss_tokens * (vector + 8)
        assert by_hand <= row.stored_bytes <= by_hand + HEADER_BYTES


def test_the_report_gives_kib_and_the_size_of_a_public_data_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert stored_bytes.main(["--shape", "tiny", "--tokens", "512", "--out", str(tmp_path)]) == 0
    result = StoredBytes.model_validate_json((tmp_path / "stored-bytes.json").read_text())
    first = result.rows[0]
    text = (tmp_path / "stored-bytes.md").read_text()
    assert text == capsys.readouterr().out
    kib, terabytes = first.stored_bytes / first.num_tokens / 1024, first.stored_bytes / first.num_tokens * 1.2208e-3
    assert f"| {kib:.2f} | {terabytes:.1f} |" in text
