import torch

from specforge_core.decoding.kv_cache import CAPACITY_STEP, RowBuffer, Window, make_window


def window(first_row: int, starts: list[int], num_new: int, context_limit: int = 10_000) -> Window:
    rows = slice(first_row, first_row + len(starts))
    return make_window(
        rows, starts, num_new, context_limit=context_limit, dtype=torch.float32, device=torch.device("cpu")
    )


def numbered(num_rows: int, num_new: int, offset: float) -> torch.Tensor:
    """[rows, 1 head, tokens, width 1]: offset + 100 row + token."""
    return offset + 100.0 * torch.arange(num_rows)[:, None, None, None] + torch.arange(num_new)[None, None, :, None]


def test_every_token_reads_what_is_before_it_in_its_own_row():
    mask = window(0, [3, 1], 2).mask_B1TL[:, 0] == 0
    # Rows at positions 3, 4 and 1, 2; five keys because the longer row has so many.
    assert mask.int().tolist() == [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]]


def test_positions_past_the_context_limit_are_held_back_but_stored_apart():
    past = window(0, [6], 4, context_limit=8)
    assert past.position_ids_BT.tolist() == [[6, 7, 7, 7]]
    assert past.slots_BT.tolist() == [[6, 7, 8, 9]]


def test_a_shorter_start_rewinds_a_row_and_leaves_the_other():
    buffer = RowBuffer(2)
    buffer.update(numbered(2, 4, 0.0), -numbered(2, 4, 0.0), window(0, [0, 0], 4))
    keys, values = buffer.update(numbered(2, 2, 1000.0), -numbered(2, 2, 1000.0), window(0, [1, 4], 2))
    assert keys[0, 0, :3, 0].tolist() == [0, 1000, 1001]
    assert keys[1, 0, :6, 0].tolist() == [100, 101, 102, 103, 1100, 1101]
    assert torch.equal(values, -keys)


def test_one_row_can_be_written_alone_and_copied():
    buffer = RowBuffer(3)
    buffer.update(numbered(3, 2, 0.0), numbered(3, 2, 0.0), window(0, [0, 0, 0], 2))
    keys, _ = buffer.update(numbered(1, 1, 7.0), numbered(1, 1, 8.0), window(2, [1], 1))
    assert keys[0, 0, :, 0].tolist() == [200, 7]
    buffer.copy_row(2, 0)
    keys, values = buffer.update(numbered(2, 1, 9.0), numbered(2, 1, 9.0), window(0, [2, 2], 1))
    assert keys[:, 0, :, 0].tolist() == [[200, 7, 9], [100, 101, 109]]
    assert values[0, 0, :, 0].tolist() == [200, 8, 9]


def test_a_row_that_outgrows_its_buffer_keeps_what_it_holds():
    buffer = RowBuffer(2)
    length = CAPACITY_STEP - 1
    buffer.update(numbered(2, length, 0.0), numbered(2, length, 0.0), window(0, [0, 0], length))
    keys, _ = buffer.update(numbered(2, 4, 5000.0), numbered(2, 4, 5000.0), window(0, [length, 3], 4))
    assert keys.shape[2] == length + 4
    assert keys[0, 0, :, 0].tolist() == [*range(length), 5000, 5001, 5002, 5003]
    assert keys[1, 0, :7, 0].tolist() == [100, 101, 102, 5100, 5101, 5102, 5103]
