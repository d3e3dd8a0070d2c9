"""Drafts and batches of random numbers: only sizes and masks decide how long a step takes.

T tokens of a packed batch, U teaching tokens, L captured layers, D width, V target vocabulary, W draft vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from specforge_core.draft_limits import NUM_AUX_LAYERS
from specforge_core.drafts.base import DraftBatch, TargetHead
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.drafts.rows import is_teaching, slot_depths
from specforge_core.manifest_sections import Eagle3Config
from specforge_core.training.bench.lengths import Conversation
from specforge_core.training.bench.shapes import RowCounts, Shape
from specforge_core.training.workers import compute_dtype

HEAD_STD = 0.02
CAPTURE_LAYERS = (1, 15, 28)


def make_draft(shape: Shape, *, num_steps: int, seed: int, device: torch.device) -> Eagle3Draft:
    """A draft of random weights on the device; the first W tokens of the target are its vocabulary."""
    torch.manual_seed(seed)
    dtype = compute_dtype(device)
    with torch.device(device):
        embedding_VD = torch.randn(shape.vocab_size, shape.width, dtype=dtype)
        # The draft reads the rows of its own vocabulary, and no others.
        head_WD = torch.randn(shape.draft_vocab_size, shape.width, dtype=dtype) * HEAD_STD
        draft = Eagle3Draft.create(
            Eagle3Config(num_steps=num_steps, draft_vocab_size=shape.draft_vocab_size),
            shape.target_config(),
            TargetHead(embedding_VD, head_WD, final_norm_D=None),
            torch.arange(shape.draft_vocab_size),
            CAPTURE_LAYERS,
        )
    draft.compute_dtype = dtype
    return draft


def make_batch(conversations: Sequence[Conversation], shape: Shape, *, seed: int, device: torch.device) -> DraftBatch:
    """The conversations as a packed batch on the CPU; `device` is where the random numbers are drawn.

    The target's favourites are in the draft vocabulary, so that every supervised slot carries a loss.
    """
    dtype = compute_dtype(device)
    generator = torch.Generator(device).manual_seed(seed)
    loss_masks = [loss_mask(conversation) for conversation in conversations]
    loss_mask_T = torch.cat(loss_masks)
    lengths = torch.tensor([len(mask) for mask in loss_masks])
    document_ids_T = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
    teaching_U = is_teaching(loss_mask_T, document_ids_T).nonzero().squeeze(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype).cpu()

    def token_ids(count: int, below: int) -> Tensor:
        return torch.randint(below, (count,), generator=generator, device=device).cpu()

    num_tokens = len(loss_mask_T)
    return DraftBatch(
        input_ids_T=token_ids(num_tokens, shape.vocab_size),
        loss_mask_T=loss_mask_T,
        position_ids_T=torch.cat([torch.arange(length) for length in lengths.tolist()]),
        document_ids_T=document_ids_T,
        aux_hidden_TLD=normal(num_tokens, NUM_AUX_LAYERS, shape.width),
        teaching_U=teaching_U,
        last_hidden_UD=normal(len(teaching_U), shape.width),
        target_argmax_U=token_ids(len(teaching_U), shape.draft_vocab_size),
        # Of standard normal logits; only the acceptance depends on it.
        target_logsumexp_U=torch.full((len(teaching_U),), math.log(shape.vocab_size) + 0.5),
    )


def count_rows(batch: DraftBatch, num_steps: int) -> RowCounts:
    """The counts of a packed batch on the CPU."""
    depth_T = slot_depths(batch.loss_mask_T, batch.document_ids_T, num_steps)
    num_tokens = len(depth_T)
    is_taught_by_T = torch.zeros(num_tokens + num_steps + 1, dtype=torch.bool)
    rows, num_keys = [], 0
    for step in range(num_steps):
        slots = (depth_T > step).nonzero().squeeze(1)
        is_taught_by_T[slots + 1 + step] = True
        rows.append(len(slots))
        num_keys += int((batch.position_ids_T[slots] + 1 + step).sum())
    return RowCounts(num_tokens, int(is_taught_by_T.sum()), tuple(rows), num_keys)


def loss_mask(conversation: Conversation) -> Tensor:
    """bool [T], True in answers."""
    is_answer = torch.tensor([False, True]).repeat(len(conversation))
    return is_answer.repeat_interleave(torch.tensor([length for turn in conversation for length in turn]))


def to_device(batch: DraftBatch, device: torch.device) -> DraftBatch:
    """The batch with its row index on the device."""
    moved: DraftBatch = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
    return moved
