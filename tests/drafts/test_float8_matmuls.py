"""The option `float8_matmuls`: what it rounds, what it leaves alone, and how far off that makes loss and gradients.

On a CPU, factors are rounded as on a GPU and multiplied exactly.
"""

import pytest
import torch
from torch import Tensor, nn

from specforge_core.drafts.base import DraftBatch, DraftLoss
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.drafts.linear import FeedForward, make_weight
from specforge_core.kernels.float8_product import float8_weight
from specforge_core.kernels.linear_soft_cross_entropy import Teacher, linear_soft_cross_entropy
from specforge_core.training.bench.batch import make_batch, make_draft, to_device
from specforge_core.training.bench.lengths import Conversation, Turn
from specforge_core.training.bench.shapes import SHAPES, Shape

CPU = torch.device("cpu")
CONVERSATIONS: list[Conversation] = [(Turn(3, 26), Turn(2, 19)), (Turn(11, 12),), (Turn(1, 44),), (Turn(4, 1),)]
MODERATE = Shape(1024, 2816, 16, 8, 64, 8192, 4096)

# A product of random numbers is off by 3.8 %; forward and backward, a gradient went through several of them. In the
# loss, the errors of thousands of logits nearly cancel.
MAX_LOSS_ERROR = 5e-4
MAX_GRADIENT_ERROR = 0.12


def loss_and_gradients(draft: Eagle3Draft, batch: DraftBatch, *, float8: bool) -> tuple[DraftLoss, dict[str, Tensor]]:
    draft.float8_matmuls = float8
    draft.zero_grad()
    loss = draft.accumulate_gradients(batch)
    return loss, {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}


def relative_errors(shape: Shape, conversations: list[Conversation], device: torch.device) -> dict[str, float]:
    """Of the loss, and of the gradient of each parameter, by norms."""
    draft = make_draft(shape, num_steps=4, seed=2, device=device)
    batch = to_device(draft.prepare(make_batch(conversations, shape, seed=3, device=device)), device)
    exact_loss, exact = loss_and_gradients(draft, batch, float8=False)
    loss, gradients = loss_and_gradients(draft, batch, float8=True)
    errors = {name: float((gradients[name] - grad).norm() / grad.norm()) for name, grad in exact.items()}
    return errors | {"loss": abs(float(loss.loss_sum / exact_loss.loss_sum) - 1)}


def check_errors(errors: dict[str, float]) -> None:
    loss_error = errors.pop("loss")
    assert 0 < loss_error < MAX_LOSS_ERROR
    # Every parameter's gradient goes through a rounded product, or is one of rounded activations.
    assert all(0 < error < MAX_GRADIENT_ERROR for error in errors.values()), errors


def test_loss_and_gradients_are_off_by_roundings_alone() -> None:
    check_errors(relative_errors(SHAPES["tiny"], CONVERSATIONS, CPU))


@pytest.mark.gpu
def test_loss_and_gradients_are_off_by_roundings_alone_on_a_gpu() -> None:
    conversations = [(Turn(40, 300), Turn(20, 90)), (Turn(200, 900),), (Turn(30, 400),)] * 2
    check_errors(relative_errors(MODERATE, conversations, torch.device("cuda")))


def test_what_is_evaluated_is_not_in_float8() -> None:
    draft = make_draft(SHAPES["tiny"], num_steps=3, seed=2, device=CPU)
    batch = draft.prepare(make_batch(CONVERSATIONS, SHAPES["tiny"], seed=3, device=CPU))
    exact_loss, exact_chains = draft(batch), draft.greedy_chains(batch, 3)
    draft.float8_matmuls = True
    assert draft(batch).loss_sum == exact_loss.loss_sum
    assert torch.equal(draft.greedy_chains(batch, 3), exact_chains)
    assert draft.accumulate_gradients(batch).loss_sum != exact_loss.loss_sum


def rounded(rows: Tensor) -> Tensor:
    """The rows of float64 as float8 with a scale each, written out."""
    scale = rows.float().abs().amax(1, keepdim=True) / 448
    return (rows.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def assert_equal_but_for_scales(actual: object, expected: object) -> None:
    # Scales are float32, and their last bit may differ; one other rounding would be a difference of 1e-2.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-4)


def test_the_head_rounds_both_factors_of_two_products_and_neither_teacher_nor_weight_gradient() -> None:
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, 48, 16, dtype=torch.float64)
    weight, teacher_head = torch.randn(2, 32, 16, dtype=torch.float64)
    target_logits = teacher_hidden @ teacher_head.T
    teacher = Teacher(teacher_hidden, teacher_head, target_logits.argmax(1), target_logits.logsumexp(1))
    logits = rounded(hidden) @ rounded(weight).T
    grad_logits = 0.5 * (logits.softmax(1) - target_logits.softmax(1))
    loss = nn.functional.cross_entropy(logits, target_logits.softmax(1), reduction="sum")

    weight_grad = torch.zeros_like(weight)
    head = linear_soft_cross_entropy(
        [hidden], weight, teacher, torch.arange(48), torch.ones(48, dtype=torch.int64),
        step_weights=[0.5], weight_grad_WH=weight_grad, weight_float8=float8_weight(weight),
    )  # fmt: skip
    assert head.hidden_grads is not None
    assert_equal_but_for_scales(head.loss_S, loss.unsqueeze(0))
    assert_equal_but_for_scales(head.hidden_grads[0], rounded(grad_logits) @ rounded(weight.T).T)
    assert_equal_but_for_scales(weight_grad, grad_logits.T @ hidden)


def test_the_feed_forward_rounds_both_factors_of_three_products_and_no_weight_gradient() -> None:
    torch.manual_seed(0)
    gate, up, down = (nn.Parameter(torch.randn(size, dtype=torch.float64)) for size in ((32, 16), (32, 16), (16, 32)))
    x, grad = torch.randn(2, 48, 16, dtype=torch.float64)

    gate_up = torch.cat((gate, up)).detach()
    projected = (rounded(x) @ rounded(gate_up).T).requires_grad_()
    activation = nn.functional.silu(projected[:, :32]) * projected[:, 32:]
    expected = rounded(activation.detach()) @ rounded(down.detach()).T
    grad_activation = rounded(grad) @ rounded(down.detach().T).T
    (grad_projected,) = torch.autograd.grad(activation, projected, grad_activation)
    expected_grads = {
        "x": rounded(grad_projected) @ rounded(gate_up.T).T,
        "gate_up": grad_projected.T @ x,
        "down": grad.T @ activation.detach(),
    }

    feed_forward = FeedForward(
        make_weight([gate, up], torch.float64, in_float8=True), make_weight([down], torch.float64, in_float8=True), 48
    )
    leaf = x.clone().requires_grad_()
    output = feed_forward(leaf)
    output.backward(grad)
    feed_forward.accumulate()
    assert gate.grad is not None
    assert up.grad is not None
    assert_equal_but_for_scales(output.detach(), expected)
    actual_grads = {"x": leaf.grad, "gate_up": torch.cat((gate.grad, up.grad)), "down": down.grad}
    assert_equal_but_for_scales(actual_grads, expected_grads)
