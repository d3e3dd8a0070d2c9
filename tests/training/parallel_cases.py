"""One training step on several processes, and what each of them is to compare: run by `test_parallel.py`."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from specforge_core.drafts.base import DraftBatch
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training.evaluate import evaluate
from specforge_core.training.optim import build_optimizers
from specforge_core.training.parallel import parallelize, reassemble
from specforge_core.training.sharding import as_dtensor
from specforge_core.training.step import train_step
from specforge_core.training.workers import Workers
from tests.drafts.synthetic import TARGET_CONFIG, as_dtype, make_document, make_draft, pack
from tests.processes import on_processes
from tests.training.factory import make_batch, make_wide_draft

# Uneven on purpose: long and short answers, a batch of a prompt alone, one with a single row, and a step of one batch.
STEPS = (
    (("PPPAAAAAAAAAAAAAA", "PAA"), ("PPPPPP",), ("PAAPPAAAAPA", "PPAAAA"), ("PPPPPPAAA",)),
    (("PPAAAAAAAAA", "PAAAA"), ("PAAAAAAAPPP",), ("PPPAA",)),
    (("PP" + 25 * "A",),),
)
MAX_GRAD_NORM = 0.05
"""Below every norm here, so that clipping is part of what is compared."""


class Case(NamedTuple):
    """A mesh and an optimizer."""

    dp: int = 1
    cp: int = 1
    tp: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"


def draft_of_the_cases() -> Eagle3Draft:
    return make_draft(target_config=TARGET_CONFIG | {"num_key_value_heads": 2}, fc_norm=True, norm_output=True)


def batches_of_the_cases(step: int) -> list[DraftBatch]:
    return [
        pack([make_document(mask, seed=100 * step + 10 * number + i) for i, mask in enumerate(masks)])
        for number, masks in enumerate(STEPS[step])
    ]


def trained(case: Case, rank: int) -> dict[str, Any]:
    """Losses, norms, gradients of the first step, and weights behind the last, by name; whole tensors."""
    config = TrainingConfig(optimizer=case.optimizer, learning_rate=1e-2)
    workers = Workers(rank, case.dp * case.cp * case.tp, torch.device("cpu"), case.cp, case.tp)
    draft = draft_of_the_cases()
    sharding = parallelize(draft, config, workers)
    optimizers = build_optimizers(sharding, config)
    found: dict[str, Any] = {}
    for step in range(len(STEPS)):
        mine = batches_of_the_cases(step)[workers.replica :: workers.num_replicas]
        prepared = [draft.prepare(batch) for batch in mine]
        losses, grad_norm = train_step(draft, optimizers, prepared, MAX_GRAD_NORM, workers, sharding)
        found |= {f"step {step} {name}": value.clone() for name, value in losses._asdict().items()}
        found[f"step {step} grad_norm"] = grad_norm
        for piece in sharding.pieces:
            assert piece.shard.grad is not None
            found[f"step {step} gradient of {piece.name}"] = whole(as_dtensor(piece, piece.shard.grad)).clone()
            found[f"step {step} {piece.name}"] = whole(as_dtensor(piece, piece.shard)).clone()
    for name, fields in sharding.state(optimizers)["state"].items():
        found |= {f"{field} of {name}": whole(value).clone() for field, value in fields.items()}
    batches = batches_of_the_cases(0)[workers.replica :: workers.num_replicas]
    losses, *counts = evaluate(draft, [draft.prepare(batch) for batch in batches], workers)
    found |= {f"evaluated {name}": value for name, value in losses._asdict().items()}
    found["chains"] = draft.greedy_chains(batches_of_the_cases(0)[0], 3)
    found |= {"output tokens": torch.tensor(counts[0]), "verify steps": torch.tensor(counts[1])}
    reassemble(draft)
    assert draft.shape == draft_of_the_cases().shape
    found |= {f"exported {name}": tensor.double() for name, tensor in draft.serving_state_dict().items()}
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def steps_in_bfloat16(cases: Sequence[Case], device: str, rank: int) -> list[dict[str, Tensor]]:
    """Losses and gradients of one step as GPUs train, by case and name; whole tensors.

    A case of one process is computed by each of them for itself. Of the processes of all cases together only.
    """
    found = []
    for case in cases:
        num_processes = case.dp * case.cp * case.tp
        workers = Workers(rank if num_processes > 1 else 0, num_processes, torch.device(device), case.cp, case.tp)
        try:
            found.append(_wide_step(torch.bfloat16, workers))
        except Exception as error:
            # All cases share one start, which takes longer than they do.
            error.add_note(str(case))
            raise
    return found


@functools.cache
def step_in_float64() -> dict[str, Tensor]:
    """The same in float64 on a CPU, by the references of the kernels."""
    return _wide_step(torch.float64, Workers(0, 1, torch.device("cpu")))


def wide_batches(dtype: torch.dtype) -> list[DraftBatch]:
    """Four micro-batches, so that there is one for each of four replicas."""
    batches = [make_batch([(40, 200), (30, 100), (20, 250 + seed)], seed=seed) for seed in range(4)]
    return [as_dtype(batch, dtype) for batch in batches] if dtype == torch.float64 else batches


def _wide_step(dtype: torch.dtype, workers: Workers) -> dict[str, Tensor]:
    draft = make_wide_draft()
    draft.compute_dtype = dtype
    draft.to(workers.device, torch.promote_types(dtype, torch.float32))
    config = TrainingConfig()
    sharding = parallelize(draft, config, workers)
    prepared = [
        tree_map_only(Tensor, lambda tensor: tensor.to(workers.device), draft.prepare(batch))
        for batch in wide_batches(dtype)[workers.replica :: workers.num_replicas]
    ]
    losses, _ = train_step(draft, build_optimizers(sharding, config), prepared, 0.5, workers, sharding)
    found = {name: value.double().cpu() for name, value in losses._asdict().items()}
    for piece in sharding.pieces:
        assert piece.shard.grad is not None
        found[f"gradient of {piece.name}"] = whole(as_dtensor(piece, piece.shard.grad)).double().cpu()
    return found


def trained_on(num_processes: int, cases: Sequence[Case], directory: Path) -> list[list[dict[str, Any]]]:
    """What `trained` gives for each case, by process; processes are started once, which takes the most time."""
    return on_processes(num_processes, functools.partial(_trained, cases), directory)


def _trained(cases: Sequence[Case], rank: int) -> list[dict[str, Any]]:
    return [trained(case, rank) for case in cases]
