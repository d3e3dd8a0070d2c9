import pytest
import torch

from specforge_core.benchmark.in_process import Subject, measure
from specforge_core.benchmark.lossless import LosslessCheck
from specforge_core.benchmark.measure import Workload
from specforge_core.decoding import speculative
from specforge_core.decoding.ngram import NgramDrafter
from specforge_core.decoding.verification import Verdict
from specforge_core.manifest_sections import ServingConfig
from specforge_core.targets import GenerationRequest, Sampling
from specforge_core.targets.hf import HFTarget
from tests.decoding.drafters import FunctionDrafter, knowing


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(str(i), [10 + i, 20, 30]) for i in range(count)]


@pytest.fixture(scope="module")
def target(tiny_target) -> HFTarget:
    return HFTarget(tiny_target, device="cpu")


def workload(count: int, concurrency: int = 1, max_new_tokens: int = 21, temperature: float = 0.0) -> Workload:
    serving = ServingConfig(num_steps=3, num_draft_tokens=4, concurrency=concurrency)
    return Workload("suite", requests(count), Sampling(max_new_tokens, temperature), serving, repeats=2)


def subject(target: HFTarget, drafter: FunctionDrafter, tiny_target) -> Subject:
    return Subject(target, drafter, NgramDrafter({}), LosslessCheck(tiny_target, device="cpu", loaded=target))


def ignore(*args: object) -> None:
    pass


@pytest.mark.parametrize("concurrency", [1, 3])
def test_sums_over_a_suite_are_those_counted_by_hand(target, tiny_target, concurrency):
    # With 4 prompts at concurrency 3 two prompts are in both rounds; they count once.
    full = [
        target.model.generate(torch.tensor([r.input_ids]), max_new_tokens=21, do_sample=False)[0].tolist()
        for r in requests(4)
    ]
    assert all(len(sequence) == 24 for sequence in full)
    measured = measure(subject(target, knowing(full, num_right=3), tiny_target), workload(4, concurrency), ignore)
    # 21 tokens: one from the prefill, and 4 from each of 5 verifications.
    assert (measured.num_prompts, measured.num_output_tokens, measured.num_verify_steps) == (4, 84, 20)
    assert measured.accepted_by_position == (20, 20, 20)
    assert measured.acceptance_length == 4.2
    assert (measured.lossless.num_identical, measured.lossless.num_different) == (4, 0)
    assert len(measured.output_tokens_per_s) == len(measured.baseline_output_tokens_per_s) == 2
    assert measured.speedup_low <= measured.speedup <= measured.speedup_high


def test_a_drafter_that_changes_answers_is_found_out(target, tiny_target, monkeypatch):
    def accept_everything(logits_BTV, draft_ids):
        return [Verdict(len(ids), int(row[len(ids)].argmax())) for row, ids in zip(logits_BTV, draft_ids, strict=True)]

    monkeypatch.setattr(speculative, "greedy_verdicts", accept_everything)
    measured = measure(subject(target, FunctionDrafter(lambda s, n: [1] * n), tiny_target), workload(2), ignore)
    assert measured.lossless.num_different == 2
    assert measured.lossless.num_identical == measured.lossless.num_near_tie == 0


def test_sampled_runs_claim_nothing_about_losslessness(target, tiny_target):
    drafter = FunctionDrafter(lambda s, n: [1] * n)
    assert measure(subject(target, drafter, tiny_target), workload(2, temperature=1.0), ignore).lossless is None


def test_answers_of_one_token_are_refused(target, tiny_target):
    drafter = FunctionDrafter(lambda s, n: [1] * n)
    with pytest.raises(ValueError, match="suite: every answer is a single token"):
        measure(subject(target, drafter, tiny_target), workload(2, max_new_tokens=1), ignore)


def test_every_generation_is_recorded(target, tiny_target):
    seen = []
    drafter = FunctionDrafter(lambda s, n: [1] * n)
    measure(subject(target, drafter, tiny_target), workload(3), lambda w, name, g: seen.append((name, g.completion.id)))
    assert sorted(seen, key=str) == sorted(((name, id) for name in (None, "draft", "ngram") for id in "012"), key=str)
