"""Optimizers and the learning-rate schedule of a draft."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training.sharding import Sharding

# Newton-Schulz orthogonalisation is meant for matrices that map hidden states to hidden states, not for the head.
MUON_PREFIXES = ("fc.", "midlayer.")


def muon_parameters(draft: nn.Module | Sharding, config: TrainingConfig) -> set[str]:
    """The names of the parameters that Muon is for, which wants them whole; none for another optimizer."""
    if config.optimizer != "muon":
        return set()
    return {
        name for name, parameter in draft.named_parameters() if parameter.dim() == 2 and name.startswith(MUON_PREFIXES)
    }


def build_optimizers(draft: nn.Module | Sharding, config: TrainingConfig) -> list[Optimizer]:
    """AdamW for everything; or, with `muon`, Muon for the matrices of `fc` and the layer, and AdamW for the rest.

    Weights and both optimizers' state are float32, whatever the forward pass computes in.
    """
    names_by_muon = muon_parameters(draft, config)
    by_muon: list[nn.Parameter] = []
    by_adamw: list[nn.Parameter] = []
    for name, parameter in draft.named_parameters():
        assert parameter.dtype in (torch.float32, torch.float64), f"{name} is {parameter.dtype}"
        (by_muon if name in names_by_muon else by_adamw).append(parameter)
    adamw = torch.optim.AdamW(
        by_adamw, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    optimizers: list[Optimizer] = [adamw]
    if by_muon:
        optimizers.append(torch.optim.Muon(by_muon, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def take_step(optimizers: Sequence[Optimizer], divisor: Tensor) -> None:
    """Step all optimizers with their gradients divided by a scalar, which the host does not read."""
    for optimizer in optimizers:
        if optimizer.defaults.get("fused"):
            # A fused optimizer takes the factor of a loss scaler, and divides by it in the one pass that it makes.
            optimizer.grad_scale = divisor.float()  # type: ignore[attr-defined]
        else:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(gradients, divisor.to(gradients[0].dtype))
        optimizer.step()


def learning_rate_factor(step: int, num_steps: int, warmup_fraction: float) -> float:
    """The share of the peak learning rate at a step, counted from 0.

    A linear rise, then a cosine that reaches 0 at `num_steps`, just behind the last step.
    """
    num_warmup = math.ceil(warmup_fraction * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / (num_steps - num_warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizers: list[Optimizer], factor: float) -> None:
    """Set every group to this share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
