import pytest
import torch

from specforge_core.decoding import threads
from specforge_core.targets import GenerationRequest
from specforge_core.targets.hf import HFTarget


@pytest.mark.parametrize(
    ("speeds", "fastest"), [({1: 10.0, 2: 30.0, 4: 20.0}, 2), ({1: 10.0, 2: 5.0}, 1), ({1: 1.0, 2: 2.0, 4: 4.0}, 4)]
)
def test_the_best_number_of_threads_is_found_without_trying_more_than_needed(tiny_target, monkeypatch, speeds, fastest):
    # A KeyError here: a number that need not be tried.
    monkeypatch.setattr(threads, "_output_tokens_per_s", lambda *_: speeds[torch.get_num_threads()])
    target = HFTarget(tiny_target, device="cpu")
    with threads.torch_threads(4):
        assert threads.fastest_num_threads(target, []) == fastest
        assert torch.get_num_threads() == 4


def test_a_probe_really_decodes(tiny_target):
    target = HFTarget(tiny_target, device="cpu")
    with threads.torch_threads(1):
        assert threads.fastest_num_threads(target, [GenerationRequest("a", [5, 6, 7])]) == 1
