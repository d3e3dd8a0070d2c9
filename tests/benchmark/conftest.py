"""A tiny target whose answers end by themselves now and then."""

import pytest
import torch

from specforge_core.stages import ResolvedTarget
from specforge_core.targets.hf import HFTarget
from tests import tiny


@pytest.fixture(scope="session")
def talkative_target(tmp_path_factory: pytest.TempPathFactory) -> ResolvedTarget:
    directory = tiny.make_target(tmp_path_factory.mktemp("talkative"), seed=1)
    target = HFTarget(tiny.resolved(directory), device="cpu")
    with torch.no_grad():
        # Of the random logits the end-of-turn token's swings widest, so it wins every few tokens.
        target.model.lm_head.weight[tiny.make_tokenizer().eos_token_id] *= 1.6
    target.model.save_pretrained(directory)
    return tiny.resolved(directory)
