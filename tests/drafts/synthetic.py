"""Small drafts and documents with random features, for tests of the loss and of training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specforge_core.drafts.base import DraftBatch, TargetHead
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.manifest_sections import Eagle3Config
from tests.drafts.eagle3_brute_force import Document

VOCAB_SIZE = 13
WIDTH = 8
KEPT = [0, 2, 3, 5, 6, 8, 9, 12]
TARGET_CONFIG: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    # With head_dim 4 the frequencies are 1 and 1/4, which no dtype rounds.
    "rope_theta": 16.0,
    "vocab_size": VOCAB_SIZE,
}


def make_head(seed: int = 1) -> TargetHead:
    generator = torch.Generator().manual_seed(seed)
    embedding, head = torch.randn(2, VOCAB_SIZE, WIDTH, generator=generator)
    return TargetHead(embedding, head, 1 + 0.1 * torch.randn(WIDTH, generator=generator))


def make_draft(*, seed: int = 2, target_config: dict[str, Any] | None = None, **config: Any) -> Eagle3Draft:
    """A draft with every weight away from its initial value, in float64, over `KEPT`."""
    torch.manual_seed(seed)
    draft = Eagle3Draft.create(
        Eagle3Config(**{"num_steps": 3, "draft_vocab_size": len(KEPT), **config}),
        target_config or TARGET_CONFIG,
        make_head(),
        torch.tensor(KEPT),
        (1, 3, 4),
    )
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return draft.double()


def make_document(mask: str, *, seed: int) -> Document:
    """A document with one token for each letter of `mask`: A from the target, anything else not."""
    generator = torch.Generator().manual_seed(seed)
    length = len(mask)
    return Document(
        x=torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist(),
        m=[letter == "A" for letter in mask],
        a=torch.randn(length, 3, WIDTH, generator=generator).double(),
        y=torch.randn(length, WIDTH, generator=generator).double(),
    )


def pack(documents: Sequence[Document], *, padding: int = 0) -> DraftBatch:
    """The documents one after the other, then rows of nonsense marked as padding."""
    lengths = [len(document.x) for document in documents]
    # A token teaches if the next one of its document is an answer's.
    taught = [[*document.m[1:], False] for document in documents]
    (teaching,) = torch.tensor([mark for marks in taught for mark in marks]).nonzero(as_tuple=True)
    last_hidden = torch.cat([document.y for document in documents])[teaching]
    logits = last_hidden @ make_head().lm_head_VD.double().T

    def padded(rows: Tensor, fill: float) -> Tensor:
        return torch.cat((rows, torch.full((padding, *rows.shape[1:]), fill, dtype=rows.dtype)))

    return DraftBatch(
        input_ids_T=padded(torch.tensor([token for document in documents for token in document.x]), 1),
        loss_mask_T=padded(torch.tensor([mark for document in documents for mark in document.m]), True),
        position_ids_T=padded(torch.cat([torch.arange(length) for length in lengths]), 3),
        document_ids_T=padded(torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int(), -1),
        aux_hidden_TLD=padded(torch.cat([document.a for document in documents]), 5.0),
        teaching_U=teaching,
        last_hidden_UD=last_hidden,
        target_argmax_U=logits.argmax(-1),
        target_logsumexp_U=logits.logsumexp(-1),
    )


def as_dtype(batch: DraftBatch, dtype: torch.dtype) -> DraftBatch:
    """The batch with every number in it of this dtype."""
    return DraftBatch(*(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch))
