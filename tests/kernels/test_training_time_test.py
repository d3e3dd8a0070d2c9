"""The EAGLE-3 loss with its kernels against the float64 reference, which the brute force has proved.

In float32 through Triton's interpreter here; in bfloat16 on a GPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_core.drafts.base import DraftBatch, DraftLoss, TargetHead
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.drafts.eagle3_reference import reference_loss
from specforge_core.drafts.rows import index_rows
from specforge_core.manifest_sections import Eagle3Config
from tests.drafts.synthetic import as_dtype


def make_draft(width: int, vocab_size: int, *, num_steps: int, **config: Any) -> Eagle3Draft:
    """A random float64 draft whose numbers bfloat16 holds exactly, with four query heads and two KV heads."""
    torch.manual_seed(0)
    target_config = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
    }
    head = TargetHead(torch.randn(vocab_size, width), torch.randn(vocab_size, width) / 8, None)
    kept = torch.randperm(vocab_size)[: vocab_size // 2].sort().values
    draft = Eagle3Draft.create(
        Eagle3Config(num_steps=num_steps, draft_vocab_size=len(kept), **config), target_config, head, kept, (1, 3, 4)
    )
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for tensor in (*draft.parameters(), draft.embed_tokens, draft.teacher_head):
            tensor.copy_(tensor.bfloat16())
    return draft.double()


def make_batch(draft: Eagle3Draft, masks: list[str]) -> DraftBatch:
    """Random documents with one token for each letter, an A for an answer's, in numbers that bfloat16 holds exactly."""
    lengths = torch.tensor([len(mask) for mask in masks])
    taught = torch.tensor([letter == "A" for mask in masks for letter in f"{mask[1:]}-"])
    (teaching,) = taught.nonzero(as_tuple=True)
    num_tokens, width = int(lengths.sum()), draft.fc.weight.shape[0]
    last_hidden = torch.randn(len(teaching), width).bfloat16().double()
    # A head of the target that happens to have no other tokens than those of the draft.
    logits = last_hidden @ draft.teacher_head.T
    kept = draft.draft_to_target(torch.arange(len(draft.d2t)))
    return DraftBatch(
        input_ids_T=torch.randint(len(draft.t2d), (num_tokens,)),
        loss_mask_T=torch.tensor([letter == "A" for mask in masks for letter in mask]),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        document_ids_T=torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths),
        aux_hidden_TLD=torch.randn(num_tokens, 3, width).bfloat16().double(),
        teaching_U=teaching,
        last_hidden_UD=last_hidden,
        target_argmax_U=kept[logits.argmax(-1)],
        target_logsumexp_U=logits.logsumexp(-1) + 0.1,
    )


def exact(draft: Eagle3Draft, batch: DraftBatch) -> tuple[DraftLoss, dict[str, Tensor]]:
    draft.zero_grad()
    loss = reference_loss(draft, batch)
    loss.loss_sum.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}


def computed(draft: Eagle3Draft, batch: DraftBatch) -> tuple[DraftLoss, dict[str, Tensor]]:
    draft.zero_grad()
    loss = draft.accumulate_gradients(batch)
    return loss, {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double().cpu() - expected.cpu()).norm() / expected.cpu().norm()).item()


MASKS = ["PPPAAAAAAAAAAAAAAAAAA", "PAAPPPAAAAAAA", "PPPPPPP", "AAAAAAAAAA"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are compiled")
@pytest.mark.parametrize(
    ("num_steps", "config"),
    [(2, {}), pytest.param(3, {"fc_norm": True, "norm_output": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_kernels_in_the_interpreter_equal_the_reference_in_float64(num_steps: int, config: dict[str, bool]):
    draft = make_draft(64, 50, num_steps=num_steps, **config)
    batch = make_batch(draft, MASKS)
    expected, expected_grads = exact(draft, batch)
    index = index_rows(
        batch.loss_mask_T, batch.document_ids_T, batch.teaching_U, num_steps=num_steps, rows_per_pass=24, bucket=8
    )
    assert len(index.passes) == 2
    prepared = as_dtype(batch, torch.float32)._replace(rows=index)
    loss, grads = computed(draft.float(), prepared)
    for actual, wanted in zip(loss, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted.double(), rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, {"fc_norm": True, "norm_output": True}], ids=str)
def test_bfloat16_on_a_gpu_is_as_exact_as_plain_bfloat16(config: dict[str, bool]):
    """Compacted, packed and in several passes, against twice the error of plain PyTorch in bfloat16."""
    draft = make_draft(512, 4096, num_steps=7, **config)
    masks = ["P" * 300 + "A" * 200, "P" * 20 + "A" * 30 + "P" * 50 + "A" * 700, "A" * 9, "P" * 40 + "A" * 5, "P" * 64]
    batch = make_batch(draft, masks)
    expected, expected_grads = exact(draft, batch)
    draft, on_gpu = draft.float().cuda(), DraftBatch(*(x.cuda() for x in as_dtype(batch, torch.bfloat16)[:-1]))
    on_gpu = on_gpu._replace(target_logsumexp_U=batch.target_logsumexp_U.float().cuda())
    draft.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        plain = reference_loss(draft, on_gpu)
    plain.loss_sum.backward()
    plain_grads = {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}

    draft.compute_dtype = torch.bfloat16
    index = index_rows(
        batch.loss_mask_T, batch.document_ids_T, batch.teaching_U, num_steps=7, rows_per_pass=512, bucket=128
    )
    assert len(index.passes) == 2
    prepared = on_gpu._replace(rows=torch.utils._pytree.tree_map_only(Tensor, lambda x: x.cuda(), index))
    loss, grads = computed(draft, prepared)

    assert loss.num_tokens.item() == expected.num_tokens.item()
    assert loss.valid_K.tolist() == expected.valid_K.tolist()
    floor = 1e-4
    for name in ("loss_sum", "accepted_K"):
        budget = 2 * relative_error(getattr(plain, name), getattr(expected, name)) + floor
        assert relative_error(getattr(loss, name), getattr(expected, name)) <= budget, name
    # The favourite of a row changes where two logits are closer than bfloat16 tells apart.
    assert (loss.correct_K.cpu() - expected.correct_K).abs().max() <= 0.02 * expected.valid_K[0]
    for name, grad in grads.items():
        budget = 2 * relative_error(plain_grads[name], expected_grads[name]) + floor
        assert relative_error(grad, expected_grads[name]) <= budget, name


@pytest.mark.gpu
def test_gradients_accumulate_in_float32():
    """Eight times the same batch gives eight times its gradient, which bfloat16 sums would round."""
    draft = make_draft(512, 4096, num_steps=3).float().cuda()
    draft.compute_dtype = torch.bfloat16
    batch = make_batch(draft.cpu().double(), ["P" * 30 + "A" * 300])
    draft = draft.float().cuda()
    prepared = draft.prepare(DraftBatch(*(x.cuda() for x in as_dtype(batch, torch.float32)[:-1])))
    _, once = computed(draft, prepared)
    for _ in range(7):
        draft.accumulate_gradients(prepared)
    for name, parameter in draft.named_parameters():
        assert relative_error(parameter.grad, 8 * once[name].double()) < 1e-3, name
