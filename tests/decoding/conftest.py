"""The tiny target, loaded once, and what `transformers` itself makes of some prompts."""

from typing import NamedTuple

import pytest
import torch

from specforge_core.stages import ResolvedTarget
from specforge_core.targets import GenerationRequest
from specforge_core.targets.hf import HFTarget

NUM_NEW_TOKENS = 41


class Reference(NamedTuple):
    """A prompt, and its greedy answer by `transformers`."""

    request: GenerationRequest
    answer: list[int]

    @property
    def full(self) -> list[int]:
        return [*self.request.input_ids, *self.answer]


@pytest.fixture(scope="session")
def target(tiny_target: ResolvedTarget) -> HFTarget:
    return HFTarget(tiny_target, device="cpu")


@pytest.fixture(scope="session")
def references(target: HFTarget) -> list[Reference]:
    """Prompts of 1 to 61 tokens; the longest answer ends beyond one buffer's first capacity of 128 tokens."""
    generator = torch.Generator().manual_seed(0)
    references = []
    for i, length in enumerate((1, 7, 95, 20, 61)):
        prompt = torch.randint(0, 256, (length,), generator=generator).tolist()
        output = target.model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        references.append(Reference(GenerationRequest(f"request-{i}", prompt), output[0, length:].tolist()))
    return references
