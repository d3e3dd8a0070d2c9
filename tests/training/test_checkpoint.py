"""Checkpoints: whole or absent, two kept, everything restored."""

from pathlib import Path

import pytest
import torch

from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training.checkpoint import TrainingState, checkpoints, load_checkpoint, save_checkpoint
from specforge_core.training.optim import build_optimizers
from tests.drafts.synthetic import make_document, make_draft, pack

CONFIG = TrainingConfig(optimizer="muon", learning_rate=1e-2)


def state(step: int, key: str = "mine") -> TrainingState:
    return TrainingState(key=key, step=step, tokens_seen=10 * step)


def take_steps(draft, optimizers, count: int) -> list[float]:
    batch = draft.prepare(pack([make_document("PPAAAAAA", seed=3)]))
    losses = []
    for _ in range(count):
        draft.zero_grad()
        loss = draft.accumulate_gradients(batch).loss_sum
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_goes_on_bit_for_bit_with_both_optimizers(tmp_path: Path):
    draft = make_draft()
    optimizers = build_optimizers(draft, CONFIG)
    take_steps(draft, optimizers, 3)
    path = save_checkpoint(tmp_path, draft, optimizers, state(3))
    expected = take_steps(draft, optimizers, 3)

    other = make_draft(seed=99)
    other_optimizers = build_optimizers(other, CONFIG)
    assert load_checkpoint(path, other, other_optimizers, key="mine") == state(3)
    assert take_steps(other, other_optimizers, 3) == expected
    assert expected[0] != expected[1]


def test_the_last_two_are_kept(tmp_path: Path):
    draft = make_draft()
    for step in (5, 90, 1000):
        save_checkpoint(tmp_path, draft, build_optimizers(draft, CONFIG), state(step))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000090", "step-00001000"]


def test_a_half_written_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draft = make_draft()
    optimizers = build_optimizers(draft, CONFIG)
    save_checkpoint(tmp_path, draft, optimizers, state(1))

    def out_of_space(path: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "rename", out_of_space)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, draft, optimizers, state(2))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    monkeypatch.undo()
    # What was left half written is in nobody's way.
    save_checkpoint(tmp_path, draft, optimizers, state(2))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def test_a_checkpoint_of_another_spec_is_refused(tmp_path: Path):
    draft = make_draft()
    optimizers = build_optimizers(draft, CONFIG)
    path = save_checkpoint(tmp_path, draft, optimizers, state(1, key="theirs"))
    with pytest.raises(ValueError, match=r"another spec \(key theirs, not mine\)"):
        load_checkpoint(path, draft, optimizers, key="mine")


def test_weights_and_optimizer_state_are_no_pickles(tmp_path: Path):
    draft = make_draft()
    optimizers = build_optimizers(draft, CONFIG)
    take_steps(draft, optimizers, 1)
    path = save_checkpoint(tmp_path, draft, optimizers, state(1))
    assert sorted(file.name for file in path.iterdir()) == ["draft.safetensors", "optimizer.safetensors", "state.json"]
    assert torch.equal(make_draft().d2t, draft.d2t)
