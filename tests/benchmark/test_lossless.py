import copy

import pytest
import torch

from specforge_core.benchmark import lossless
from specforge_core.benchmark.lossless import RELATIVE_ROUNDING, LosslessCheck
from specforge_core.targets.hf import HFTarget

PROMPT = [72, 101, 108, 108, 111]


@pytest.fixture(scope="module")
def target(tiny_target) -> HFTarget:
    return HFTarget(tiny_target, device="cpu")


@pytest.fixture(scope="module")
def answer(target) -> list[int]:
    return target.model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0, len(PROMPT) :].tolist()


def tied(target: HFTarget, token: int, other_token: int, relative_gap: float) -> HFTarget:
    """The target with a second token whose logit is always that of the first, less a share of it."""
    changed = copy.copy(target)
    changed.model = copy.deepcopy(target.model)
    with torch.no_grad():
        head = changed.model.lm_head.weight
        head[other_token] = head[token] * (1.0 - relative_gap)
    return changed


def test_equal_answers_are_identical(tiny_target, target, answer):
    assert LosslessCheck(tiny_target, device="cpu", loaded=target).verdict(PROMPT, answer, list(answer)) == "identical"


@pytest.mark.parametrize(("rounding_errors", "verdict"), [(0.0, "near_tie"), (0.5, "near_tie"), (2.0, "different")])
def test_a_tie_is_one_only_within_rounding(tiny_target, target, answer, rounding_errors, verdict):
    place = 3
    twin = next(token for token in range(259) if token not in answer)
    other = [*answer[:place], twin, *answer[:2]]
    changed = tied(target, answer[place], twin, rounding_errors * RELATIVE_ROUNDING["float32"])
    check = LosslessCheck(tiny_target, device="cpu", loaded=changed)
    # The favourite's logit must be the largest in size too for its share to be the margin.
    logits_V = changed.model(torch.tensor([[*PROMPT, *answer[:place]]])).logits[0, -1]
    scale = float(logits_V[answer[place]] / logits_V.abs().max())
    assert 0.5 < scale <= 1.0
    assert check.verdict(PROMPT, answer, other) == verdict
    assert check.verdict(PROMPT, other, answer) == verdict


def test_two_equal_logits_that_are_not_the_best_are_no_near_tie(tiny_target, target, answer):
    place = 2
    first, second = [token for token in range(259) if token not in answer][:2]
    changed = tied(target, first, second, 0.0)
    wrong = [*answer[:place], first]
    also_wrong = [*answer[:place], second]
    assert LosslessCheck(tiny_target, device="cpu", loaded=changed).verdict(PROMPT, wrong, also_wrong) == "different"


def test_another_token_is_different(tiny_target, target, answer):
    other = [*answer[:4], (answer[4] + 1) % 259, *answer[5:]]
    assert LosslessCheck(tiny_target, device="cpu", loaded=target).verdict(PROMPT, answer, other) == "different"


def test_an_answer_that_goes_on_is_different(tiny_target, target, answer):
    assert LosslessCheck(tiny_target, device="cpu", loaded=target).verdict(PROMPT, answer[:5], answer) == "different"


def test_a_bfloat16_target_is_judged_by_a_float32_copy(tiny_target, answer):
    spec = tiny_target.model_copy(update={"dtype": "bfloat16"})
    check = LosslessCheck(spec, device="cpu", loaded=HFTarget(spec, device="cpu"))
    assert check.verdict(PROMPT, answer, answer) == "identical"
    assert check.reference is None, "no difference, no copy"
    other = [*answer[:4], (answer[4] + 1) % 259]
    assert check.verdict(PROMPT, answer, other) == "different"
    assert check.reference.model.dtype == torch.float32


def test_a_copy_that_does_not_fit_on_the_gpu_is_used_on_the_cpu(tiny_target, target, answer, monkeypatch, caplog):
    def load(spec, *, device):
        if device == "cuda":
            raise torch.OutOfMemoryError("32 GiB")
        return target

    monkeypatch.setattr(lossless, "HFTarget", load)
    check = LosslessCheck(tiny_target, device="cuda")
    assert check.verdict(PROMPT, answer, [*answer[:4], (answer[4] + 1) % 259]) == "different"
    assert check.reference is target
    assert "near-ties are looked at on the CPU" in caplog.text
