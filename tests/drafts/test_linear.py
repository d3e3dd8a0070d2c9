"""Products whose weight gradient goes straight to `.grad`, against the same products by autograd."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_core.drafts.linear import FeedForward, linear, make_weight


def parameters(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def check(
    actual: Tensor,
    expected: Tensor,
    leaves: list[Tensor],
    weights: list[nn.Parameter],
    behind: Callable[[], None] = lambda: None,
) -> None:
    """Same value, same gradient of a random projection of it; the weights' gradients on top of what was there."""
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), [*leaves, *weights])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    (actual * direction).sum().backward()
    behind()
    for x, grad in zip(leaves, wanted, strict=False):
        torch.testing.assert_close(x.grad, grad)
    for weight, grad in zip(weights, wanted[len(leaves) :], strict=True):
        torch.testing.assert_close(weight.grad, grad + 1)


def test_linear_of_stacked_parameters():
    top, bottom = parameters((4, 6), (2, 6))
    x = leaf(5, 6)
    check(
        linear(x, make_weight([top, bottom], torch.float64)), F.linear(x, torch.cat((top, bottom))), [x], [top, bottom]
    )


def test_linear_of_columns_leaves_the_gradient_of_the_others_alone():
    top, bottom = parameters((4, 6), (2, 6))
    x = leaf(5, 4)
    weight = make_weight([top, bottom], torch.float64, slice(2, 6))
    check(linear(x, weight), F.linear(x, torch.cat((top, bottom))[:, 2:]), [x], [top, bottom])
    assert torch.equal(top.grad[:, :2], torch.ones(4, 2, dtype=torch.float64))


def test_a_part_of_a_weight_is_that_of_its_parameters():
    first, second, third = parameters((4, 6), (2, 6), (3, 6))
    x = leaf(5, 6)
    part = make_weight([first, second, third], torch.float64).part(1, 3)
    check(linear(x, part), F.linear(x, torch.cat((second, third))), [x], [second, third])


def test_a_weight_is_trained_by_inputs_that_want_no_gradient():
    (weight,) = parameters((4, 6))
    x = torch.randn(5, 6, dtype=torch.float64)
    linear(x, make_weight([weight], torch.float64)).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, 6))


def test_feed_forward_of_two_steps():
    gate, up, down = parameters((4, 3), (4, 3), (3, 4))
    x = leaf(5, 3)

    def layer(x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    expected = layer(layer(x)[:3])
    feed_forward = FeedForward(make_weight([gate, up], torch.float64), make_weight([down], torch.float64), 8)
    actual = feed_forward(feed_forward(x)[:3])
    check(actual, expected, [x], [gate, up, down], behind=feed_forward.accumulate)


def test_feed_forward_without_gradient():
    gate, up, down = parameters((4, 3), (4, 3), (3, 4))
    x = leaf(5, 3)
    with torch.no_grad():
        feed_forward = FeedForward(make_weight([gate, up], torch.float64), make_weight([down], torch.float64), 5)
        actual = feed_forward(x)
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    torch.testing.assert_close(actual, expected.detach())


def test_without_gradients_nothing_is_kept():
    (weight,) = parameters((4, 6))
    with torch.no_grad():
        assert not linear(leaf(5, 6), make_weight([weight], torch.float64)).requires_grad
    assert weight.grad is None
