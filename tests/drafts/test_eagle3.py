"""The EAGLE-3 loss against the brute force, and the promises around it. All in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_core.drafts import eagle3 as eagle3_module
from specforge_core.drafts.base import DraftBatch, DraftLoss
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.drafts.eagle3_reference import active_slots, reference_loss
from specforge_core.drafts.rows import index_rows
from tests.drafts.eagle3_brute_force import Shape, Sums, eagle3
from tests.drafts.synthetic import KEPT, as_dtype, make_document, make_draft, make_head, pack

# Answers at the front, in the middle, twice in a document, of one and two tokens (too short for any slot), and none.
MASKS = ["PPPPAAAAAA", "AAAAA", "PPAAAPPPAAAAPP", "PPAPAA", "PPPP", "A"]

# Sums of some hundred float64 products, each rounded to 1.1e-16.
FLOAT64_TOLERANCE = 1e-11


def documents():
    return [make_document(mask, seed=10 + i) for i, mask in enumerate(MASKS)]


Gradients = tuple[DraftLoss, dict[str, Tensor]]


def gradients(draft: Eagle3Draft, batch: DraftBatch) -> Gradients:
    draft.zero_grad()
    loss = draft.accumulate_gradients(draft.prepare(batch))
    nothing = torch.zeros(())
    return loss, {
        name: nothing.expand_as(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in draft.named_parameters()
    }


def in_small_passes(draft: Eagle3Draft, batch: DraftBatch) -> Gradients:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eagle3_module, "MAX_ROWS_PER_PASS", 3)
        assert len(draft.prepare(batch).rows.passes) > 2
        return gradients(draft, batch)


def in_buckets(draft: Eagle3Draft, batch: DraftBatch) -> Gradients:
    draft.zero_grad()
    index = index_rows(
        batch.loss_mask_T, batch.document_ids_T, batch.teaching_U,
        num_steps=draft.num_positions, rows_per_pass=8, bucket=8,
    )  # fmt: skip
    assert any(rows.num_rows[0] > int((rows.depth_R > 0).sum()) for rows in index.passes)
    loss = draft.accumulate_gradients(batch._replace(rows=index))
    return loss, {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}


def by_reference(draft: Eagle3Draft, batch: DraftBatch) -> Gradients:
    draft.zero_grad()
    loss = reference_loss(draft, batch)
    loss.loss_sum.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}


def by_brute_force(draft: Eagle3Draft) -> tuple[Sums, dict[str, Tensor]]:
    shape = Shape.of(draft.serving_config(), num_steps=draft.num_positions, decay=0.8)
    weights = {name: p.detach().clone().requires_grad_() for name, p in draft.named_parameters()}
    head = make_head()
    sums = eagle3(weights, shape, head.embedding_VD.double(), head.lm_head_VD.double(), KEPT, documents())
    sums.loss.backward()
    return sums, {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "fc_norm": True},
        {"norm_output": True},
        {"fc_norm": True, "norm_output": True, "num_steps": 4, "num_key_value_heads": 2},
        {"num_steps": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [gradients, in_small_passes, in_buckets, by_reference])
def test_loss_metrics_and_every_gradient_equal_the_brute_force(
    path: Callable[[Eagle3Draft, DraftBatch], Gradients], variant: dict[str, Any]
):
    draft = make_draft(**variant)
    loss, grads = path(draft, pack(documents()))
    expected, expected_grads = by_brute_force(draft)

    torch.testing.assert_close(loss.loss_sum, expected.loss, rtol=FLOAT64_TOLERANCE, atol=0)
    assert loss.num_tokens == expected.num_tokens
    assert loss.valid_K.tolist() == expected.valid
    assert loss.correct_K.tolist() == expected.correct
    assert loss.accepted_K.tolist() == pytest.approx(expected.accepted, rel=FLOAT64_TOLERANCE)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max()
        assert scale > 0, f"{name} gets no gradient, so nothing is compared"
        torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=FLOAT64_TOLERANCE * scale, msg=name)


def test_the_example_has_rows_in_and_out_of_the_draft_vocabulary():
    batch = pack(documents())
    slots = active_slots(batch, 1)[0].nonzero().squeeze(1)
    is_kept = torch.isin(batch.target_argmax_U[torch.searchsorted(batch.teaching_U, slots + 1)], torch.tensor(KEPT))
    assert is_kept.any()
    assert not is_kept.all()


def test_active_slots_are_those_of_the_alignment_table():
    # x0..x3 prompt, x4..x7 answer: the table of the EAGLE-3 specification, written out.
    active = active_slots(pack([make_document("PPPPAAAA", seed=0)]), 3).int().tolist()
    assert active == [
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
    ]


def test_no_slot_runs_into_the_next_document():
    # Both documents are answers throughout; slots 0..1 of the first predict its tokens 2 and 3, and no more.
    active = active_slots(pack([make_document("AAAA", seed=0), make_document("AAA", seed=1)], padding=2), 2)
    assert active.int().tolist() == [[1, 1, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]]


def test_slot_reads_tokens_and_teachers_of_the_alignment_table():
    """Which inputs the loss of slot 3 alone depends on, found by changing one at a time."""
    document = make_document("PPPPAAAA", seed=5)
    draft = make_draft(num_steps=2)
    # Only x4, x5, x6 are marked: slot 3 is active at steps 0 and 1, slot 4 at step 0.
    document = document._replace(m=[False] * 4 + [True] * 3 + [False])

    def slot_losses(document):
        batch = pack([document])
        batch = batch._replace(target_argmax_U=torch.full_like(batch.target_argmax_U, KEPT[0]))
        return loss_of(draft, batch).loss_sum.item()

    def changes(**fields) -> bool:
        return slot_losses(document._replace(**fields)) != slot_losses(document)

    # Tokens in: x1..x4 as step-0 keys of slots 0..3, x5 by slot 4 at step 0 and by slot 3 at step 1; x6 is only taught.
    reads_token = [
        changes(x=[*document.x[:t], (document.x[t] + 1) % 13, *document.x[t + 1 :]]) for t in range(len(document.x))
    ]
    assert reads_token == [False, True, True, True, True, True, False, False]

    def nudged(states: Tensor, t: int) -> Tensor:
        states = states.clone()
        states[t] += torch.linspace(0.5, 1.5, states.shape[-1])
        return states

    # Auxiliary states of slots up to 4; teachers p4 (slot 3, step 0) and p5 (slot 4, step 0, and slot 3, step 1).
    assert [changes(a=nudged(document.a, t)) for t in range(8)] == [True] * 5 + [False] * 3
    assert [changes(y=nudged(document.y, t)) for t in range(8)] == [False] * 4 + [True, True, False, False]


def loss_of(draft: Eagle3Draft, batch: DraftBatch) -> DraftLoss:
    return draft(draft.prepare(batch))


def sums_of(loss: DraftLoss) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in loss])


def test_padding_does_not_change_the_loss_or_the_gradients():
    draft = make_draft()
    loss, grads = gradients(draft, pack(documents()))
    padded_loss, padded_grads = gradients(draft, pack(documents(), padding=5))
    torch.testing.assert_close(sums_of(padded_loss), sums_of(loss), rtol=FLOAT64_TOLERANCE, atol=0)
    torch.testing.assert_close(padded_grads, grads, rtol=0, atol=FLOAT64_TOLERANCE * 100)


def test_packing_adds_up_to_the_documents_alone():
    draft = make_draft()
    together, grads = gradients(draft, pack(documents()))
    alone = [gradients(draft, pack([document])) for document in documents()]
    torch.testing.assert_close(sum(sums_of(loss) for loss, _ in alone), sums_of(together), rtol=1e-11, atol=1e-13)
    for name, grad in grads.items():
        torch.testing.assert_close(sum(part[name] for _, part in alone), grad, rtol=0, atol=1e-9)


def test_document_order_does_not_change_the_loss():
    draft = make_draft()
    torch.testing.assert_close(
        sums_of(loss_of(draft, pack(documents()[::-1]))),
        sums_of(loss_of(draft, pack(documents()))),
        rtol=FLOAT64_TOLERANCE,
        atol=0,
    )


def test_batch_without_supervised_rows_gives_zero_and_zero_gradients():
    draft = make_draft()
    loss, grads = gradients(draft, pack([make_document("PPPP", seed=0)]))
    assert sums_of(loss).tolist() == [0.0] * len(sums_of(loss))
    assert all(not grad.any() for grad in grads.values())


def test_float32_is_within_rounding_of_float64():
    draft = make_draft()
    batch = pack(documents())
    exact = loss_of(draft, batch)
    rounded = loss_of(draft.float(), as_dtype(batch, torch.float32))
    assert rounded.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=1e-5)


def test_gradients_add_up_over_batches_as_they_do_over_their_documents():
    draft = make_draft()
    _, together = gradients(draft, pack(documents()))
    draft.zero_grad()
    for document in documents():
        draft.accumulate_gradients(draft.prepare(pack([document])))
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=0, atol=1e-9)


def test_the_loss_without_gradient_is_the_same_and_leaves_no_gradient():
    draft = make_draft()
    loss, _ = gradients(draft, pack(documents()))
    draft.zero_grad()
    assert torch.equal(sums_of(loss_of(draft, pack(documents()))), sums_of(loss))
    assert all(parameter.grad is None for parameter in draft.parameters())


def test_a_batch_without_its_row_index_is_refused():
    with pytest.raises(ValueError, match="prepare"):
        make_draft()(pack(documents()))
