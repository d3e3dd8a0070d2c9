"""The speculative loop over stored conversations, against a loop that really feeds a draft its own tokens."""

import random

import pytest
import torch

from specforge_core.drafts.base import DraftBatch, DraftLoss
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.training.evaluate import CHAIN_LENGTH, Evaluation, answers, evaluate, verify_steps
from specforge_core.training.workers import Workers
from tests.drafts.eagle3_brute_force import Document, Shape, hidden_states, rms
from tests.drafts.synthetic import KEPT, make_document, make_draft, make_head, pack

ALONE = Workers(rank=0, world_size=1, device=torch.device("cpu"))


def likely_document(draft: Eagle3Draft, mask: str, seed: int) -> Document:
    """Three of four tokens that a chain can hold are those that the draft proposes: all lengths are accepted."""
    document = make_document(mask, seed=seed)
    chooser = random.Random(seed)
    for position in range(2, len(mask)):
        if mask[position - 1 : position + 1] != "AA":
            continue
        proposed = draft.greedy_chains(pack([document]), 1)[0, position - 2].item()
        if chooser.random() < 0.75:
            document.x[position] = proposed
    return document


def prepared(draft: Eagle3Draft, *batches: list[Document]) -> list[DraftBatch]:
    return [draft.prepare(pack(documents)) for documents in batches]


def loop_step_by_step(draft: Eagle3Draft, document: Document, start: int, stop: int) -> int:
    """Verification steps for the answer x[start:stop]: draft with own tokens, compare, go on behind the first error."""
    shape = Shape.of(draft.serving_config(), num_steps=CHAIN_LENGTH)
    weights = {name: parameter.detach() for name, parameter in draft.named_parameters()}
    embedding = make_head().embedding_VD.double()
    num_steps, num_known = 0, start + 1
    while num_known < stop:
        chain: list[int] = []
        for k in range(min(CHAIN_LENGTH, stop - num_known)):
            # What the server knows: the tokens so far and its own chain. The rest is nothing that it could look at.
            tokens = [*document.x[:num_known], *chain, 0]
            seen = document._replace(x=tokens, m=[False] * len(tokens))
            hidden = hidden_states(weights, shape, embedding, seen)[k][num_known - 2]
            logits = weights["lm_head.weight"] @ rms(hidden, weights["norm.weight"], shape.eps)
            chain.append(KEPT[logits.argmax().item()])
        accepted = 0
        while accepted < len(chain) and chain[accepted] == document.x[num_known + accepted]:
            accepted += 1
        num_known += accepted + 1
        num_steps += 1
    return num_steps


def test_acceptance_length_is_that_of_a_real_loop():
    draft = make_draft()
    masks = ["PPPAAAAAAAAAAAA", "PPAAAAAAPPPAAAAAA", "PPA"]
    documents = [likely_document(draft, mask, seed=i) for i, mask in enumerate(masks)]
    with torch.no_grad():
        steps = [
            loop_step_by_step(draft, documents[0], 3, 15),
            loop_step_by_step(draft, documents[1], 2, 8),
            loop_step_by_step(draft, documents[1], 11, 17),
        ]
    # Neither never nor always right, or the comparison would say little.
    assert 12 / 4 < sum(steps) < 21
    evaluation = evaluate(draft, prepared(draft, documents[:1], documents[1:]), ALONE)
    assert evaluation.num_verify_steps == sum(steps)
    assert evaluation.num_output_tokens == 12 + 6 + 6 + 1
    assert evaluation.acceptance_length == 25 / sum(steps)


def test_evaluation_sums_the_loss_of_its_batches():
    draft = make_draft()
    documents = [make_document("PPAAAAAA", seed=1), make_document("PAAAAA", seed=2)]
    evaluation = evaluate(draft, prepared(draft, documents[:1], documents[1:]), ALONE)
    (together,) = (draft(batch) for batch in prepared(draft, documents))
    assert evaluation.losses.loss_sum.item() == pytest.approx(together.loss_sum.item(), rel=1e-12)
    assert evaluation.losses.valid_K.tolist() == together.valid_K.tolist()
    expected_accuracy = (together.correct_K / together.valid_K).tolist()
    assert [evaluation.metrics()[f"eval/accuracy_{k}"] for k in range(3)] == pytest.approx(expected_accuracy)


def test_verification_steps_of_an_answer_by_hand():
    # Tokens 3..10; the first is known. Slot 2 drafts after token 3: 3 right ones and the target's own, known up to 7.
    # Slot 6: none right, known up to 8. Slot 7: 1 right, known up to 10, done: 3 steps.
    accepted = [9, 9, 3, 9, 9, 9, 0, 1, 9, 9, 9]
    assert verify_steps(range(3, 11), accepted) == 3
    assert verify_steps(range(3, 4), accepted) == 0


def test_answers_are_unbroken_runs_within_a_document():
    batch: DraftBatch = pack([make_document("PAAPAA", seed=0), make_document("AAP", seed=1)], padding=3)
    assert answers(batch) == [range(1, 3), range(4, 6), range(6, 8)]


def test_evaluation_without_a_whole_step_is_refused():
    nothing = DraftLoss.zero(3, torch.device("cpu"))
    with pytest.raises(ValueError, match="no held-out answer has two tokens"):
        _ = Evaluation(nothing, num_output_tokens=1, num_verify_steps=0).acceptance_length
