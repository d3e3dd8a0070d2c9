"""Tests of add and rotate: by hand, against float64 and `transformers`, and its sums in place."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specforge_core.kernels import dispatch
from specforge_core.kernels.cases import Numbers, check
from specforge_core.kernels.cases_elementwise import add_rope_case
from specforge_core.kernels.rope import Angles, Part, add_rope, add_rope_reference


@pytest.mark.parametrize(
    ("num_rows", "heads", "head_width"),
    [
        (1, {"query": (2, 2)}, 64),
        (6, {"query": (5, 5), "key_value": (4, 2)}, 20),
        (4, {"query": (32, 32), "key_value": (16, 8)}, 128),
        (3, {"key_value": (3, 1)}, 2),
    ],
)
def test_outputs_and_gradients_are_as_close_to_float64_as_eager_pytorch(
    num_rows: int, heads: dict[str, tuple[int, int]], head_width: int, device: torch.device
) -> None:
    case = add_rope_case(num_rows, heads, head_width)
    check(case, device, torch.float32)
    with dispatch.references():
        check(case, device, torch.float32)


def tables(device: torch.device, head_width: int, num_positions: int = 16) -> tuple[Tensor, Tensor]:
    angle_PC2 = torch.arange(num_positions, device=device)[:, None] * 0.5 ** torch.arange(
        head_width // 2, device=device
    )
    return angle_PC2.cos(), angle_PC2.sin()


def test_a_head_is_added_to_and_turned_by_its_position(device: torch.device) -> None:
    # One pair per head, a quarter of a turn per position; the second head is a value and stays as it is.
    quarter = torch.arange(4, device=device)[:, None] * (math.pi / 2)
    x = torch.tensor([[1.0, 0.0, 5.0, 6.0]], device=device)
    shared = torch.tensor([[9.0] * 4, [1.0, 1.0, 1.0, 1.0], [9.0] * 4], device=device)
    index, position = torch.tensor([0], device=device), torch.tensor([2], device=device)
    (y,) = add_rope(x, [Part(2, 1, shared, None, index, 1)], position, 1, quarter.cos(), quarter.sin())
    # (1, 0) + (1, 1) = (2, 1), at position 2 + 1 turned by 270 degrees: (1, -2).
    assert y[0, 0].tolist() == pytest.approx([1.0, -2.0], abs=1e-6)
    assert y[0, 1].tolist() == [6.0, 7.0]


def test_heads_turn_as_in_transformers(device: torch.device) -> None:
    cos_PC2, sin_PC2 = tables(device, 8)
    x_RE, position_R = Numbers(device, torch.float32).normal(5, 24), torch.tensor([3, 0, 7, 1, 1], device=device)
    part = Part(3, 3, torch.zeros(1, 24, device=device), None, torch.zeros_like(position_R), 0)
    (y_RNC,) = add_rope(x_RE, [part], position_R, 0, cos_PC2, sin_PC2)
    cos, sin = (torch.cat((table, table), dim=1)[position_R][None] for table in (cos_PC2, sin_PC2))
    heads = x_RE.view(1, 5, 3, 8).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    torch.testing.assert_close(y_RNC, expected[0].transpose(0, 1))


@pytest.mark.parametrize("plain", [False, True])
def test_the_gradient_of_the_embedding_half_adds_up_over_calls(plain: bool, device: torch.device) -> None:
    cos_PC2, sin_PC2 = tables(device, 4)
    numbers = Numbers(device, torch.float32)
    x_RE, shared_XE = numbers.leaf(3, 8), numbers.leaf(6, 8)
    shared_grad_XE = torch.zeros(6, 8, device=device)
    index_R, position_R = torch.tensor([4, 0, 2], device=device), torch.tensor([0, 3, 5], device=device)
    expected = torch.zeros(6, 8, device=device)
    for shift in (0, 1):
        grad = numbers.normal(3, 2, 4)
        part = Part(2, 1, shared_XE.detach(), shared_grad_XE, index_R, shift)
        with dispatch.references() if plain else torch.enable_grad():
            (y,) = add_rope(x_RE, [part], position_R, shift, cos_PC2, sin_PC2)
            y.backward(grad)
        part = Part(2, 1, shared_XE, None, index_R, shift)
        (y,) = add_rope_reference(x_RE.detach(), [part], Angles(position_R, shift, cos_PC2, sin_PC2))
        expected += torch.autograd.grad(y, shared_XE, grad)[0]
    torch.testing.assert_close(shared_grad_XE, expected)


@pytest.mark.parametrize("plain", [False, True])
def test_padding_rows_change_no_sum(plain: bool, device: torch.device) -> None:
    cos_PC2, sin_PC2 = tables(device, 4)
    x_RE = Numbers(device, torch.float32).leaf(5, 4)
    shared_XE, shared_grad_XE = torch.zeros(3, 4, device=device), torch.zeros(3, 4, device=device)
    # Rows 2 to 4 repeat row 1, and nothing that they give is used.
    index_R, position_R = torch.tensor([0, 1, 1, 1, 1], device=device), torch.zeros(5, dtype=torch.int64, device=device)
    with dispatch.references() if plain else torch.enable_grad():
        part = Part(1, 1, shared_XE, shared_grad_XE, index_R, 0)
        (y_RNC,) = add_rope(x_RE, [part], position_R, 0, cos_PC2, sin_PC2)
        y_RNC[:2].sum().backward()
    # At position 0 nothing is turned.
    assert shared_grad_XE.tolist() == [[1.0] * 4, [1.0] * 4, [0.0] * 4]
    assert x_RE.grad is not None
    assert x_RE.grad.tolist() == [[1.0] * 4] * 2 + [[0.0] * 4] * 3


@pytest.mark.parametrize("plain", [False, True])
def test_the_prefix_of_longer_indices_is_used_and_the_last_row_stands_for_those_past_the_end(
    plain: bool, device: torch.device
) -> None:
    cos_PC2, sin_PC2 = torch.ones(2, 1, device=device), torch.zeros(2, 1, device=device)
    x_RE = torch.zeros(3, 2, device=device)
    shared_XE = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)
    token_R = torch.arange(9, device=device)
    with dispatch.references() if plain else torch.enable_grad():
        (y_RNC,) = add_rope(x_RE, [Part(1, 1, shared_XE, None, token_R, 1)], token_R, 1, cos_PC2, sin_PC2)
    assert y_RNC[:, 0].tolist() == [[3.0, 4.0], [5.0, 6.0], [5.0, 6.0]]


def test_tables_may_be_columns_of_wider_ones_and_rows_too(device: torch.device) -> None:
    cos_PC2, sin_PC2 = tables(device, 8)
    wide_cos, wide_sin = (torch.cat((table, table), dim=1) for table in (cos_PC2, sin_PC2))
    numbers = Numbers(device, torch.float32)
    x_RE, shared_XE, index_R = numbers.normal(4, 48), numbers.normal(9, 32), torch.arange(4, device=device)
    part = Part(2, 1, shared_XE[:, 16:], None, index_R, 2)
    (y,) = add_rope(x_RE[:, 8:24], [part], index_R, 0, wide_cos[:, :4], wide_sin[:, :4])
    (expected,) = add_rope_reference(x_RE[:, 8:24], [part], Angles(index_R, 0, cos_PC2, sin_PC2))
    torch.testing.assert_close(y, expected)


def test_without_gradients_nothing_is_added_up(device: torch.device) -> None:
    cos_PC2, sin_PC2 = tables(device, 4)
    shared_XE, shared_grad_XE = torch.zeros(2, 4, device=device), torch.zeros(2, 4, device=device)
    index_R = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad():
        part = Part(1, 1, shared_XE, shared_grad_XE, index_R, 0)
        (y,) = add_rope(torch.ones(1, 4, device=device), [part], index_R, 0, cos_PC2, sin_PC2)
    assert y.tolist() == [[[1.0] * 4]]
    assert not shared_grad_XE.any()


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    cos_PC2, sin_PC2 = tables(device, 4)
    x_RE, shared_XE = torch.zeros(2, 8, device=device), torch.zeros(3, 8, device=device)
    index_R = torch.zeros(2, dtype=torch.int64, device=device)
    part = Part(2, 1, shared_XE, None, index_R, 0)
    with pytest.raises(ValueError, match=r"x is \(2, 8\) but the parts have 16 columns"):
        add_rope(x_RE, [part, part], index_R, 0, cos_PC2, sin_PC2)
    with pytest.raises(ValueError, match="2 rows with 1 positions"):
        add_rope(x_RE, [part], index_R[:1], 0, cos_PC2, sin_PC2)
    with pytest.raises(ValueError, match="3 rotated"):
        add_rope(x_RE, [part._replace(num_rotated=3)], index_R, 0, cos_PC2, sin_PC2)
    with pytest.raises(ValueError, match="would be lost"):
        add_rope(x_RE, [part._replace(shared_grad_XE=torch.zeros_like(shared_XE))], index_R, 0, cos_PC2, sin_PC2)
