"""Tests of the head: against float64 sums written out row by row, and against eager PyTorch's error."""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from specforge_core.kernels import cases, cases_head, dispatch
from specforge_core.kernels import linear_soft_cross_entropy as head
from specforge_core.kernels.cases import assert_within_error_budget
from specforge_core.kernels.head_chunks import plan_chunks
from specforge_core.kernels.linear_soft_cross_entropy import (
    HeadLoss,
    Teacher,
    linear_soft_cross_entropy,
    linear_soft_cross_entropy_reference,
)

STEP_WEIGHTS = (1.0, 0.8, 0.64)


class Inputs(NamedTuple):
    """Arguments of the head."""

    hidden: list[Tensor]
    weight_WH: Tensor
    teacher: Teacher
    teacher_R: Tensor
    depth_R: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        sums_dtype = torch.promote_types(dtype, torch.float32)
        teacher = self.teacher._replace(
            hidden_UH=self.teacher.hidden_UH.to(dtype),
            head_WH=self.teacher.head_WH.to(dtype),
            logsumexp_U=self.teacher.logsumexp_U.to(sums_dtype),
        )
        return self._replace(
            hidden=[x.to(dtype) for x in self.hidden], weight_WH=self.weight_WH.to(dtype), teacher=teacher
        )


class Outcome(NamedTuple):
    """Sums [S] and gradients, by name."""

    sums: dict[str, Tensor]
    gradients: dict[str, Tensor]


def make_inputs(
    device: torch.device, row_counts: tuple[int, ...] = (9, 8, 5), vocab_size: int = 33, width: int = 8
) -> Inputs:
    """Random rows, a third of them less deep than their step has rows, a quarter of favourites outside."""
    generator = torch.Generator().manual_seed(vocab_size)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    num_steps, num_rows = len(row_counts), row_counts[0]
    num_teachers = num_rows + num_steps
    favourite_U = torch.randint(vocab_size, (num_teachers,), generator=generator)
    favourite_U[torch.rand(num_teachers, generator=generator) < 0.25] = -1
    deepest_R = torch.tensor([sum(row < count for count in row_counts) for row in range(num_rows)])
    depth_R = torch.where(torch.rand(num_rows, generator=generator) < 0.3, deepest_R - 1, deepest_R)
    teacher = Teacher(randn(num_teachers, width), randn(vocab_size, width), favourite_U.to(device), torch.empty(0))
    logits_UW = teacher.hidden_UH.double() @ teacher.head_WH.double().T
    return Inputs(
        hidden=[randn(count, width) for count in row_counts],
        weight_WH=randn(vocab_size, width),
        teacher=teacher._replace(logsumexp_U=(logits_UW.logsumexp(1) + 0.3).float()),
        # The same teacher row for several rows, in no order.
        teacher_R=torch.randint(num_teachers - num_steps + 1, (num_rows,), generator=generator).to(device),
        depth_R=depth_R.to(device),
    )


def row_by_row(inputs: Inputs) -> Outcome:
    """The definitions in float64, one active row at a time."""
    hidden, weight_WH, teacher, teacher_R, depth_R = inputs.to(torch.float64)
    sums = {name: weight_WH.new_zeros(len(hidden)) for name in ("loss", "correct", "accepted", "valid")}
    hidden_grads = [torch.zeros_like(x) for x in hidden]
    weight_grad_WH = torch.zeros_like(weight_WH)
    for step, hidden_RH in enumerate(hidden):
        for row in range(len(hidden_RH)):
            if depth_R[row] <= step:
                continue
            sums["valid"][step] += 1
            u = int(teacher_R[row]) + step
            if teacher.argmax_U[u] < 0:
                continue
            z_W = teacher.head_WH @ teacher.hidden_UH[u]
            target_W = (z_W - z_W.max()).exp() / (z_W - z_W.max()).exp().sum()
            x_W = weight_WH @ hidden_RH[row]
            p_W = (x_W - x_W.max()).exp() / (x_W - x_W.max()).exp().sum()
            sums["loss"][step] -= (target_W * p_W.log()).sum()
            sums["accepted"][step] += torch.minimum(p_W, (z_W - teacher.logsumexp_U[u]).exp()).sum()
            sums["correct"][step] += x_W.argmax() == teacher.argmax_U[u]
            dx_W = STEP_WEIGHTS[step] * (p_W - target_W)
            hidden_grads[step][row] = dx_W @ weight_WH
            weight_grad_WH += dx_W.unsqueeze(1) * hidden_RH[row]
    return Outcome(sums, {**{f"hidden_{i}": grad for i, grad in enumerate(hidden_grads)}, "weight": weight_grad_WH})


def fused(inputs: Inputs, *, weight_grad_WH: Tensor | None = None) -> Outcome:
    """What the function under test gives."""
    if weight_grad_WH is None:
        dtype = torch.promote_types(inputs.weight_WH.dtype, torch.float32)
        weight_grad_WH = torch.zeros_like(inputs.weight_WH, dtype=dtype)
    weights = STEP_WEIGHTS[: len(inputs.hidden)]
    result = linear_soft_cross_entropy(*inputs, step_weights=weights, weight_grad_WH=weight_grad_WH)
    assert result.hidden_grads is not None
    gradients = {f"hidden_{i}": grad for i, grad in enumerate(result.hidden_grads)}
    return Outcome(sums_of(result), gradients | {"weight": weight_grad_WH})


def eager(inputs: Inputs) -> Outcome:
    """What the reference gives with autograd."""
    hidden = [x.detach().requires_grad_() for x in inputs.hidden]
    weight_WH = inputs.weight_WH.detach().requires_grad_()
    result = linear_soft_cross_entropy_reference(hidden, weight_WH, *inputs[2:])
    sum(weight * loss for weight, loss in zip(STEP_WEIGHTS, result.loss_S, strict=False)).backward()
    gradients = {f"hidden_{i}": x.grad for i, x in enumerate(hidden)} | {"weight": weight_WH.grad}
    return Outcome(sums_of(result), {name: grad for name, grad in gradients.items() if grad is not None})


def sums_of(result: HeadLoss) -> dict[str, Tensor]:
    return {name.removesuffix("_S"): sums_S.detach() for name, sums_S in result._asdict().items() if name[-2:] == "_S"}


def assert_within_budget(actual: Outcome, exact: Outcome, eager: Outcome) -> None:
    """Hits and counts are exact, the rest is within the error budget."""
    for name in ("correct", "valid"):
        assert actual.sums[name].tolist() == exact.sums[name].tolist(), name
    for name in ("loss", "accepted"):
        assert_within_error_budget(
            actual.sums[name], exact.sums[name], eager.sums[name], what=name, factor=cases.FORWARD_FACTOR
        )
    assert actual.gradients.keys() == exact.gradients.keys()
    for name, gradient in actual.gradients.items():
        assert_within_error_budget(
            gradient, exact.gradients[name], eager.gradients[name], what=name, factor=cases.BACKWARD_FACTOR
        )


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    with dispatch.references() if name == "torch" else contextlib.nullcontext():
        yield


BOTH = pytest.mark.parametrize("name", ["triton", "torch"])


@BOTH
def test_two_tokens_by_hand(name: str, device: torch.device) -> None:
    # Logits (ln 3, 0) give p = (3/4, 1/4), those of the second row (-ln 3, 0) give (1/4, 3/4). The target has
    # P = (1/4, 3/4) and half of its mass outside the draft vocabulary: Q = (1/8, 3/8). A third row is not active, a
    # fourth has the target's favourite outside.
    log_3 = math.log(3.0)
    teacher = Teacher(
        hidden_UH=torch.tensor([[1.0], [1.0]], device=device),
        head_WH=torch.tensor([[0.0], [log_3]], device=device),
        argmax_U=torch.tensor([1, -1], device=device),
        logsumexp_U=torch.full((2,), math.log(8.0), device=device),
    )
    weight_grad_WH = torch.tensor([[10.0], [20.0]], device=device)
    with implementation(name):
        result = linear_soft_cross_entropy(
            [torch.tensor([[1.0], [-1.0], [1.0], [1.0]], device=device)],
            torch.tensor([[log_3], [0.0]], device=device),
            teacher,
            torch.tensor([0, 0, 0, 1], device=device),
            torch.tensor([1, 1, 0, 1], device=device),
            step_weights=[0.5],
            weight_grad_WH=weight_grad_WH,
        )
    first_loss = -(0.25 * math.log(0.75) + 0.75 * math.log(0.25))
    second_loss = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert result.loss_S.tolist() == pytest.approx([first_loss + second_loss], rel=1e-6)
    # min(3/4, 1/8) + min(1/4, 3/8) and min(1/4, 1/8) + min(3/4, 3/8).
    assert result.accepted_S.tolist() == pytest.approx([3 / 8 + 4 / 8], rel=1e-6)
    assert result.correct_S.tolist() == [1.0]
    assert result.valid_S.tolist() == [3.0]
    assert result.hidden_grads is not None
    # 0.5 (p - P) = (1/4, -1/4) for the first row and 0 for the second.
    assert result.hidden_grads[0].flatten().tolist() == pytest.approx([0.25 * log_3, 0.0, 0.0, 0.0], abs=1e-7)
    assert weight_grad_WH.flatten().tolist() == pytest.approx([10.25, 19.75], rel=1e-6)


@BOTH
def test_of_equal_largest_logits_the_first_is_the_guess(name: str, device: torch.device) -> None:
    inputs = make_inputs(device, row_counts=(3,), vocab_size=5)
    favourite_U = torch.tensor([0, 1, 4, 0], device=device)
    inputs = inputs._replace(
        hidden=[torch.zeros_like(inputs.hidden[0])],
        teacher=inputs.teacher._replace(argmax_U=favourite_U),
        teacher_R=torch.tensor([0, 1, 2], device=device),
        depth_R=torch.ones(3, dtype=torch.int64, device=device),
    )
    with implementation(name):
        assert fused(inputs).sums["correct"].tolist() == [1.0]


SHAPES = {
    "one row": ((1,), 33, 8),
    "all steps alike": ((6, 6, 6), 64, 16),
    "fewer rows at every step": ((9, 8, 5), 33, 8),
    "a step without rows": ((5, 3, 0), 33, 8),
    "several blocks of columns": ((4, 4), 3 * 4096 + 7, 24),
    "all of Qwen3's vocabulary": ((3, 2), 151_936, 8),
    "the largest vocabulary": ((2, 2), 262_144, 8),
}


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_gradients_are_those_of_the_definition(shape: str, name: str, device: torch.device) -> None:
    inputs = make_inputs(device, *SHAPES[shape])
    with implementation(name):
        actual = fused(inputs)
    assert_within_budget(actual, row_by_row(inputs), eager(inputs))


@pytest.mark.parametrize("shape", ["fewer rows at every step", "several blocks of columns"])
def test_float64_is_exact(shape: str, device: torch.device) -> None:
    inputs = make_inputs(device, *SHAPES[shape]).to(torch.float64)
    exact = row_by_row(inputs)
    for outcome in (fused(inputs), eager(inputs)):
        torch.testing.assert_close(outcome.sums, exact.sums, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(outcome.gradients, exact.gradients, rtol=1e-12, atol=1e-12)


@BOTH
def test_no_active_row_gives_zeros(name: str, device: torch.device) -> None:
    inputs = make_inputs(device)
    # A row that is not active may point anywhere.
    inputs = inputs._replace(depth_R=torch.zeros_like(inputs.depth_R), teacher_R=torch.full_like(inputs.depth_R, 11))
    with implementation(name):
        outcome = fused(inputs)
    for tensor in (*outcome.sums.values(), *outcome.gradients.values()):
        assert (tensor == 0).all()


@BOTH
def test_a_pass_without_rows_gives_zeros(name: str, device: torch.device) -> None:
    with implementation(name):
        outcome = fused(make_inputs(device, row_counts=(0, 0)))
    assert all(sums_S.tolist() == [0.0, 0.0] for sums_S in outcome.sums.values())
    assert (outcome.gradients["weight"] == 0).all()


@BOTH
def test_evaluation_gives_the_same_sums_without_gradients(name: str, device: torch.device) -> None:
    inputs = make_inputs(device)
    with implementation(name):
        evaluation = linear_soft_cross_entropy(*inputs, step_weights=STEP_WEIGHTS, weight_grad_WH=None)
        training = fused(inputs)
    assert evaluation.hidden_grads is None
    torch.testing.assert_close(sums_of(evaluation), training.sums, rtol=0, atol=0)


@BOTH
def test_chunks_change_nothing(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(device, row_counts=(9, 8, 5))
    with implementation(name):
        whole = fused(inputs)
        monkeypatch.setattr(head, "CHUNK_ROWS", 4)
        monkeypatch.setattr(head, "CPU_CHUNK_ELEMENTS", 4 * 33)
        chunked = fused(inputs)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_chunks_hold_every_row_once_and_are_of_about_one_size() -> None:
    row_counts = [4096, 4080, 4064, 4000, 3000, 1024, 1024]
    chunks = plan_chunks(row_counts, max_rows=8192)
    slots: list[list[int]] = [[] for _ in row_counts]
    for blocks in chunks:
        for block in blocks:
            for step in range(block.num_steps):
                slots[step].extend(range(block.slots.start, block.slots.stop))
    assert slots == [list(range(count)) for count in row_counts]
    # 21,288 rows.
    sizes = [sum(block.num_rows for block in blocks) for blocks in chunks]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 3 * len(row_counts)
    assert plan_chunks([2, 1], max_rows=1) == [[(0, 1, 2)], [(1, 1, 1)]]


@BOTH
def test_the_weight_gradient_is_added(name: str, device: torch.device) -> None:
    inputs = make_inputs(device)
    start_WH = torch.randn_like(inputs.weight_WH)
    with implementation(name):
        alone = fused(inputs).gradients["weight"]
        added = fused(inputs, weight_grad_WH=start_WH.clone()).gradients["weight"]
    torch.testing.assert_close(added, start_WH + alone, rtol=1e-6, atol=1e-6)


@BOTH
def test_inputs_stay_as_they_are(name: str, device: torch.device) -> None:
    inputs, fresh = make_inputs(device), make_inputs(device)
    with implementation(name):
        fused(inputs)
    torch.testing.assert_close(inputs, fresh, rtol=0, atol=0)


def test_gradients_go_on_into_autograd(device: torch.device) -> None:
    inputs = make_inputs(device, row_counts=(4,))
    source_RH = inputs.hidden[0].clone().requires_grad_()
    output_RH = 3.0 * source_RH
    result = linear_soft_cross_entropy(
        [output_RH], *inputs[1:], step_weights=[1.0], weight_grad_WH=torch.zeros_like(inputs.weight_WH)
    )
    assert result.hidden_grads is not None
    torch.autograd.backward([output_RH], result.hidden_grads)
    torch.testing.assert_close(source_RH.grad, 3.0 * result.hidden_grads[0])


def test_the_case_of_the_benchmark_holds(device: torch.device) -> None:
    case = cases_head.head_case("small", num_rows=40, num_steps=3, width=32, vocab_size=80)
    cases.check(case, device, torch.float32)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    inputs = make_inputs(device)

    def call(changed: Inputs, step_weights: tuple[float, ...] = STEP_WEIGHTS) -> None:
        linear_soft_cross_entropy(*changed, step_weights=step_weights, weight_grad_WH=None)

    with pytest.raises(ValueError, match="no step more than the one before"):
        call(inputs._replace(hidden=inputs.hidden[::-1]))
    with pytest.raises(ValueError, match=r"\[9, 8, 5\] rows, teacher_R and depth_R \[9, 8\]"):
        call(inputs._replace(depth_R=inputs.depth_R[:8]))
    with pytest.raises(ValueError, match="2 step_weights for 3 steps"):
        call(inputs, step_weights=(1.0, 0.5))
    with pytest.raises(ValueError, match="width and dtype must agree"):
        call(inputs._replace(weight_WH=inputs.weight_WH.double()))
    with pytest.raises(ValueError, match="32 rows, the draft's 33"):
        call(inputs._replace(teacher=inputs.teacher._replace(head_WH=inputs.teacher.head_WH[:32])))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_within_eager_errors(shape: str, device: torch.device) -> None:
    inputs = make_inputs(device, *SHAPES[shape]).to(torch.bfloat16)
    actual, exact, reference = fused(inputs), row_by_row(inputs), eager(inputs)
    # Rounded logits may tie, so a hit may be another row's; it still is the reference's.
    assert actual.sums["correct"].tolist() == reference.sums["correct"].tolist()
    exact.sums["correct"] = actual.sums["correct"]
    assert_within_budget(actual, exact, reference)


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits_are_addressed_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 1 << 14)
    device = torch.device("cuda")
    inputs = make_inputs(device, row_counts=(8400,), vocab_size=262_144, width=16).to(torch.bfloat16)
    inputs = inputs._replace(teacher_R=torch.arange(8400, device=device))
    whole = fused(inputs)
    last = slice(8400 - 8, 8400)
    part = Inputs([inputs.hidden[0][last]], *inputs[1:3], inputs.teacher_R[last], inputs.depth_R[last])
    alone_RH = fused(part).gradients["hidden_0"]
    torch.testing.assert_close(whole.gradients["hidden_0"][last], alone_RH, rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_a_cuda_graph_can_capture_the_head(device: torch.device) -> None:
    inputs = make_inputs(device, row_counts=(512, 256, 256), vocab_size=1000, width=64).to(torch.bfloat16)
    weight_grad_WH = torch.zeros_like(inputs.weight_WH, dtype=torch.float32)
    eagerly = fused(inputs, weight_grad_WH=weight_grad_WH.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused(inputs, weight_grad_WH=weight_grad_WH)
    weight_grad_WH.zero_()
    graph.replay()
    torch.testing.assert_close(captured, eagerly)


@pytest.mark.gpu
def test_new_numbers_of_rows_compile_nothing(device: torch.device) -> None:
    def kernels_compiled() -> int:
        return sum(len(kernels) for kernels, *_ in head._loss_kernel.device_caches.values())

    for row_counts in ((256, 256, 256), (512, 256, 16)):
        fused(make_inputs(device, row_counts=row_counts, vocab_size=1024, width=64).to(torch.bfloat16))
    before = kernels_compiled()
    for row_counts in ((257, 64, 1), (1024, 777, 512), (1, 1, 1)):
        fused(make_inputs(device, row_counts=row_counts, vocab_size=1024, width=64).to(torch.bfloat16))
    assert kernels_compiled() == before > 0
