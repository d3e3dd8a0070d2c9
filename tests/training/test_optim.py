"""Learning rate by hand, and which optimizer takes which weight."""

import math

import pytest
import torch

from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training.optim import build_optimizers, learning_rate_factor, set_learning_rate, take_step
from tests.drafts.synthetic import make_draft


def test_learning_rate_rises_then_falls_as_a_cosine():
    # 10 steps, 20 % warm-up: steps 0 and 1 rise, then cos(0), cos(pi/8), ... over the 8 that are left.
    factors = [learning_rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)  # half way: cos(pi/2) = 0
    assert factors[4] == pytest.approx((1 + math.sqrt(0.5)) / 2)  # cos(pi/4)
    assert factors[9] == pytest.approx((1 - math.cos(math.pi / 8)) / 2)
    assert learning_rate_factor(10, 10, 0.2) == pytest.approx(0.0)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert learning_rate_factor(0, 4, 0.0) == 1.0


def test_warm_up_of_a_tiny_share_takes_one_step():
    assert [learning_rate_factor(step, 100, 0.001) for step in (0, 1)] == [1.0, 1.0]


def names_by_optimizer(config: TrainingConfig) -> list[set[str]]:
    draft = make_draft(fc_norm=True)
    name_of = {parameter: name for name, parameter in draft.named_parameters()}
    return [
        {name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in build_optimizers(draft, config)
    ]


def test_muon_takes_the_matrices_of_the_layer_and_adamw_the_rest():
    adamw, muon = names_by_optimizer(TrainingConfig(optimizer="muon"))
    assert muon == {
        "fc.weight",
        "midlayer.self_attn.q_proj.weight",
        "midlayer.self_attn.k_proj.weight",
        "midlayer.self_attn.v_proj.weight",
        "midlayer.self_attn.o_proj.weight",
        "midlayer.mlp.gate_proj.weight",
        "midlayer.mlp.up_proj.weight",
        "midlayer.mlp.down_proj.weight",
    }
    assert adamw == {
        "fc_norm.0.weight",
        "fc_norm.1.weight",
        "fc_norm.2.weight",
        "midlayer.input_layernorm.weight",
        "midlayer.hidden_norm.weight",
        "midlayer.post_attention_layernorm.weight",
        "norm.weight",
        "lm_head.weight",
    }
    (everything,) = names_by_optimizer(TrainingConfig(optimizer="adamw"))
    assert everything == adamw | muon


def test_each_optimizer_follows_its_own_peak_rate():
    config = TrainingConfig(optimizer="muon", learning_rate=1e-3, muon_learning_rate=0.02)
    optimizers = build_optimizers(make_draft(), config)
    set_learning_rate(optimizers, 0.5)
    set_learning_rate(optimizers, 0.25)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.25e-3, 0.005]


def test_the_first_adamw_step_moves_each_weight_by_the_learning_rate():
    # By the definition of Adam: the first step is lr * g / (|g| + eps), whatever the size of g.
    draft = make_draft()
    (optimizer,) = build_optimizers(draft, TrainingConfig(learning_rate=1e-3))
    before = draft.fc.weight.detach().clone()
    draft.fc.weight.grad = torch.full_like(before, 7.0)
    optimizer.step()
    torch.testing.assert_close(before - draft.fc.weight, torch.full_like(before, 1e-3), rtol=1e-6, atol=0)


def test_a_step_divides_the_gradients_of_both_optimizers():
    # Muon's direction forgets the scale of one gradient, but not how the gradients of several steps compare.
    config = TrainingConfig(optimizer="muon", learning_rate=1e-3)
    divided, plain = make_draft(), make_draft()
    divided_optimizers, plain_optimizers = build_optimizers(divided, config), build_optimizers(plain, config)
    generator = torch.Generator().manual_seed(0)
    for divisor in (3.0, 1.0, 50.0):
        for parameter, other in zip(divided.parameters(), plain.parameters(), strict=True):
            other.grad = torch.randn(other.shape, generator=generator, dtype=other.dtype)
            parameter.grad = divisor * other.grad
        take_step(divided_optimizers, torch.tensor(divisor, dtype=torch.float64))
        for optimizer in plain_optimizers:
            optimizer.step()
    for (name, parameter), other in zip(divided.named_parameters(), plain.parameters(), strict=True):
        # Muon orthogonalises in bfloat16, where the last bit of an input may turn.
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-5, msg=f"{name} differs")
