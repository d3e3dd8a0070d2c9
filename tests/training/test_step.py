"""One optimizer step: the gradient of the mean, clipped, however its batches are dealt; on a GPU without a wait."""

import contextlib
import copy
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from specforge_core.data.loader import StoredBatch
from specforge_core.drafts.base import DraftBatch, DraftModel
from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training.metrics import Meter
from specforge_core.training.optim import build_optimizers
from specforge_core.training.prefetch import device_batches
from specforge_core.training.sharding import Sharding
from specforge_core.training.step import train_step
from specforge_core.training.workers import Workers
from tests.drafts.synthetic import make_document, make_draft, pack
from tests.training.factory import make_batch, make_gpu_draft

ALONE = Workers(rank=0, world_size=1, device=torch.device("cpu"))
CONFIG = TrainingConfig(learning_rate=1e-2)
DOCUMENTS = [make_document(mask, seed=i) for i, mask in enumerate(("PPAAAAAA", "PAAAAPPAAA", "PPPPAAAA"))]
NUM_TAUGHT = 5 + 3 + 2 + 3
"""Slots before two tokens of one answer, counted by hand in `DOCUMENTS`."""


def micro_batches(draft: DraftModel, *sizes: int) -> list[DraftBatch]:
    remaining = iter(DOCUMENTS)
    return [draft.prepare(pack([next(remaining) for _ in range(size)])) for size in sizes]


def steps_of_plain_torch(draft: DraftModel, max_grad_norm: float, num_steps: int) -> list[float]:
    """The same steps with nothing fused or folded: divide, clip, step. Returns: gradient norms."""
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2, betas=CONFIG.betas, weight_decay=0.0)
    norms = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        draft.accumulate_gradients(*micro_batches(draft, 3))
        for parameter in draft.parameters():
            assert parameter.grad is not None
            parameter.grad /= NUM_TAUGHT
        norms.append(torch.nn.utils.clip_grad_norm_(draft.parameters(), max_grad_norm).item())
        optimizer.step()
    return norms


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e6])
@pytest.mark.parametrize("sizes", [(3,), (1, 2), (1, 1, 1)])
def test_a_step_is_that_of_the_mean_gradient_clipped(max_grad_norm: float, sizes: tuple[int, ...]):
    draft, other = make_draft(), make_draft()
    optimizers = build_optimizers(draft, CONFIG)
    results = [train_step(draft, optimizers, micro_batches(draft, *sizes), max_grad_norm, ALONE) for _ in range(3)]
    expected_norms = steps_of_plain_torch(other, max_grad_norm, 3)

    assert min(expected_norms) > 0.05
    assert [result.grad_norm.item() for result in results] == pytest.approx(expected_norms, rel=1e-6)
    assert [result.losses.num_tokens.item() for result in results] == [NUM_TAUGHT] * 3
    for parameter, expected in zip(draft.parameters(), other.parameters(), strict=True):
        # The scalar that gradients are divided by is float32; an eps of 1e-8 magnifies it where a gradient is tiny.
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_gradients_keep_their_memory():
    draft = make_draft()
    optimizers = build_optimizers(draft, CONFIG)
    train_step(draft, optimizers, micro_batches(draft, 1, 2), 0.5, ALONE)
    before = [parameter.grad.data_ptr() for parameter in draft.parameters()]
    train_step(draft, optimizers, micro_batches(draft, 3), 0.5, ALONE)
    assert [parameter.grad.data_ptr() for parameter in draft.parameters()] == before


def test_a_step_without_a_supervised_token_changes_nothing():
    draft = make_draft()
    before = copy.deepcopy(draft.state_dict())
    batch = draft.prepare(pack([make_document("PPPP", seed=0)]))
    result = train_step(draft, build_optimizers(draft, CONFIG), [batch], 0.5, ALONE)
    assert result.grad_norm.item() == 0.0
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


GPU = torch.device("cuda")
GPU_DOCUMENTS = [(40, 200), (30, 100), (20, 250)]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_host_never_waits_for_a_step(optimizer: str):
    draft = make_gpu_draft()
    optimizers = build_optimizers(draft, TrainingConfig(optimizer=optimizer))
    given = [StoredBatch(draft.prepare(make_batch(GPU_DOCUMENTS, seed=seed)), None, None) for seed in range(6)]
    batches = device_batches(iter([tree_map_only(Tensor, Tensor.pin_memory, stored) for stored in given]), GPU)
    workers = Workers(rank=0, world_size=1, device=GPU)
    # The first step compiles kernels and begins the optimizers' state.
    train_step(draft, optimizers, islice(batches, 2), 0.5, workers)
    meter = Meter(draft.num_positions, GPU)
    with waiting_is_an_error():
        for _ in range(2):
            result = train_step(draft, optimizers, islice(batches, 2), 0.5, workers)
            meter.add(result.losses, num_tokens=1)
    metrics = meter.metrics(1e-4, result.grad_norm)
    assert metrics["train/loss"] > 0.0
    assert metrics["train/grad_norm"] > 0.0


@pytest.mark.gpu
def test_gradients_of_another_batch_come_out_of_a_captured_graph():
    draft = make_gpu_draft()
    batches = (make_batch(GPU_DOCUMENTS, seed=1), make_batch(GPU_DOCUMENTS[::-1], seed=2))
    first, second = (tree_map_only(Tensor, Tensor.cuda, draft.prepare(batch)) for batch in batches)
    assert sizes(first) == sizes(second)
    assert not torch.equal(first.rows.passes[0].slot_R, second.rows.passes[0].slot_R)
    expected_first, expected = (eager_gradients(draft, batch) for batch in (first, second))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        draft.accumulate_gradients(first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = draft.accumulate_gradients(first)
    for there, new in zip(tree_leaves(first), tree_leaves(second), strict=True):
        if isinstance(there, Tensor):
            there.copy_(new)
    Sharding(draft).zero_gradients()
    graph.replay()

    assert losses.loss_sum.item() == pytest.approx(draft(second).loss_sum.item(), rel=1e-3)
    for (name, parameter), gradient, other in zip(draft.named_parameters(), expected, expected_first, strict=True):
        # Sums of one order up to atomic additions, whose rounding bfloat16 passes on here and there.
        assert (parameter.grad - gradient).norm() < 2e-3 * gradient.norm(), name
        assert (other - gradient).norm() > 0.1 * gradient.norm(), name


def sizes(batch: DraftBatch) -> list[object]:
    """Every shape and every number that the host knows of a batch: what a graph takes for granted."""
    return [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(batch)]


def eager_gradients(draft: DraftModel, batch: DraftBatch) -> list[Tensor]:
    Sharding(draft).zero_gradients()
    draft.accumulate_gradients(batch)
    return [parameter.grad.clone() for parameter in draft.parameters()]
