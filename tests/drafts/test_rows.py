"""The row index against the alignment table and against the reference's own marks of active slots."""

import pytest
import torch
from torch import Tensor

from specforge_core.drafts.eagle3_reference import active_slots
from specforge_core.drafts.rows import RowIndex, index_rows, slot_depths
from tests.drafts.synthetic import make_document, pack

MASKS = ["PPPPAAAAAA", "AAAAA", "PPAAAPPPAAAAPP", "PPAPAA", "PPPP", "A", "PAAAAAAAAA"]


def batch():
    return pack([make_document(mask, seed=i) for i, mask in enumerate(MASKS)], padding=3)


def indexed(**kwargs: int) -> RowIndex:
    packed = batch()
    return index_rows(packed.loss_mask_T, packed.document_ids_T, packed.teaching_U, **kwargs)


def test_depths_are_the_columns_of_the_alignment_table():
    document = pack([make_document("PPPPAAAA", seed=0)])
    assert slot_depths(document.loss_mask_T, document.document_ids_T, 2).tolist() == [0, 0, 0, 2, 2, 1, 0, 0]
    assert slot_depths(document.loss_mask_T, document.document_ids_T, 7).tolist() == [0, 0, 0, 3, 2, 1, 0, 0]


@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_depths_count_the_active_steps_of_the_reference(num_steps: int):
    packed = batch()
    depths = slot_depths(packed.loss_mask_T, packed.document_ids_T, num_steps)
    assert depths.tolist() == active_slots(packed, num_steps).sum(0).tolist()


def rows_of(index: RowIndex, step: int) -> Tensor:
    return torch.cat([rows.slot_R[: rows.num_rows[step]] for rows in index.passes])


def test_every_active_slot_is_a_row_of_its_steps_once():
    active_ST = active_slots(batch(), 4)
    index = indexed(num_steps=4, rows_per_pass=5)
    assert [len(rows.slot_R) for rows in index.passes] == [5, 5, 5, 5, 2]
    for step in range(4):
        assert sorted(rows_of(index, step).tolist()) == active_ST[step].nonzero().squeeze(1).tolist()


def test_rows_know_their_document_and_their_teacher():
    packed = batch()
    for rows in indexed(num_steps=3, rows_per_pass=6, bucket=4).passes:
        assert torch.equal(packed.document_ids_T[rows.start_R], packed.document_ids_T[rows.slot_R])
        assert torch.equal(rows.position_R, packed.position_ids_T[rows.slot_R])
        for slot, depth, teacher in zip(
            rows.slot_R.tolist(), rows.depth_R.tolist(), rows.teacher_R.tolist(), strict=True
        ):
            for step in range(depth):
                assert packed.teaching_U[teacher + step] == slot + 1 + step
                assert rows.first_teacher <= teacher + step < rows.first_teacher + rows.num_teachers


def test_buckets_round_up_with_rows_that_have_no_loss():
    index = indexed(num_steps=3, rows_per_pass=16, bucket=8)
    # 22 slots: a pass of 16, and one of 6 rounded up.
    assert [rows.num_rows[0] for rows in index.passes] == [16, 8]
    assert all(count % 8 == 0 for rows in index.passes for count in rows.num_rows)
    for rows in index.passes:
        assert len(rows.depth_R) == rows.num_rows[0]
        assert rows.first_teacher + rows.num_teachers <= len(batch().teaching_U)
    (only,) = indexed(num_steps=3, rows_per_pass=64, bucket=64).passes
    assert only.num_rows == (64, 64, 64)
    assert (only.depth_R == 0).sum() == 64 - 22


def test_a_batch_without_answers_has_no_pass():
    packed = pack([make_document("PPPP", seed=0), make_document("PA", seed=1)])
    index = index_rows(packed.loss_mask_T, packed.document_ids_T, packed.teaching_U, num_steps=3, rows_per_pass=8)
    assert index.passes == ()


def test_shares_take_passes_to_and_fro_and_every_row_once():
    # 16 answer tokens of one document: 15 slots at step 0, in 2 x 2 passes of 4, 4, 4 and 3 rows.
    mask_T = torch.tensor([False] + [True] * 16)
    documents_T = torch.zeros(17, dtype=torch.int32)
    shares = [
        index_rows(mask_T, documents_T, torch.arange(16), num_steps=2, rows_per_pass=8, share=share, num_shares=2)
        for share in range(2)
    ]
    slots = [[sorted(one.slot_R.tolist()) for one in index.passes] for index in shares]
    assert slots == [[[0, 1, 2, 3], [12, 13, 14]], [[4, 5, 6, 7], [8, 9, 10, 11]]]
    assert [index.num_slots for index in shares] == [15, 15]
    assert shares[0].num_positions == shares[1].num_positions
