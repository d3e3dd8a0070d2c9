"""Stored features of a small random target, as the stages before training would leave them; a draft for a GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from specforge_core.artifacts import seal
from specforge_core.data.shards import Document, FeatureIndex, FeatureWriter, plan_shards, save_target
from specforge_core.data.vocab import VOCABULARY_NAME
from specforge_core.drafts.base import DraftBatch, TargetHead
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.facts import HiddenStates, Vocabulary
from specforge_core.manifest_sections import Eagle3Config, TrainingConfig
from specforge_core.stages import ResolvedTarget, TrainSpec
from specforge_core.targets import TargetFeatures
from tests.drafts.synthetic import KEPT, TARGET_CONFIG, VOCAB_SIZE, make_head

NUM_DOCUMENTS = 60
LAYERS = (1, 3, 4)


def write_features(
    directory: Path,
    *,
    seed: int = 0,
    head: TargetHead | None = None,
    config: dict[str, Any] = TARGET_CONFIG,
) -> None:
    """Documents of 12 to 40 tokens: a prompt of 4, then the target's greedy answer. The target is no language model,
    but the next token follows from the hidden states, so that there is something to learn.
    """
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    head = head or make_head()
    vocab_size, width = head.lm_head_VD.shape
    documents, features = [], []
    for number in range(NUM_DOCUMENTS):
        length = int(torch.randint(12, 41, (1,), generator=generator))
        last_hidden_TD = torch.randn(length, width, generator=generator)
        logits_TV = last_hidden_TD @ head.lm_head_VD.T
        argmax_T = logits_TV.argmax(-1)
        prompt_T = torch.randint(vocab_size, (4,), generator=generator)
        documents.append(
            Document(
                id=f"document-{number}",
                input_ids_T=torch.cat((prompt_T, argmax_T[3:-1])),
                loss_mask_T=torch.arange(length) >= 4,
            )
        )
        # What slot t has to predict, x[t+2], is the favourite at t + 1, whose state the auxiliary layers foresee.
        aux_hidden_TLD = torch.stack([last_hidden_TD.roll(-shift, dims=0) for shift in (0, 1, 2)], dim=1)
        # The tokens before the answer's teach: from the prompt's last one to the last but one of all.
        teaching = slice(3, -1)
        features.append(
            TargetFeatures(
                aux_hidden_TLD,
                last_hidden_TD[teaching],
                argmax_T[teaching].int(),
                logits_TV.logsumexp(-1)[teaching],
            )
        )
    lengths = [len(document.input_ids_T) for document in documents]
    writer = FeatureWriter(directory, FeatureIndex(layers=LAYERS, hidden_size=width, dtype="float32"))
    for shard in plan_shards(lengths, 600):
        writer.write([documents[i] for i in shard], [features[i] for i in shard])
    save_target(directory, config, head)
    facts = HiddenStates(
        layers=LAYERS,
        num_target_layers=8,
        hidden_size=width,
        dtype="float32",
        num_documents=NUM_DOCUMENTS,
        num_tokens=sum(lengths),
        num_loss_tokens=sum(lengths) - 4 * NUM_DOCUMENTS,
        num_shards=len(writer.index.shards),
    )
    seal(directory, facts, stage="capture", key="features", inputs={}, elapsed_s=0.0)


def write_vocabulary(directory: Path, *, kept: Sequence[int] = KEPT, vocab_size: int = VOCAB_SIZE) -> None:
    """Those ids as a vocabulary artifact."""
    directory.mkdir()
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[kept] = True
    save_file({"d2t": torch.tensor(kept) - torch.arange(len(kept)), "t2d": t2d}, directory / VOCABULARY_NAME)
    facts = Vocabulary(draft_vocab_size=len(kept), target_vocab_size=vocab_size, coverage=0.7)
    seal(directory, facts, stage="vocabulary", key="vocabulary", inputs={}, elapsed_s=0.0)


def make_spec(inputs: Path, **training: Any) -> TrainSpec:
    """A training over the features and the vocabulary in `inputs`; about 10 steps of 3 micro-batches an epoch."""
    config = {
        "tokens_per_batch": 144,
        "tokens_per_micro_batch": 48,
        "max_document_tokens": 40,
        "learning_rate": 2e-2,
        "eval_fraction": 0.2,
        "evals_per_run": 2,
        **training,
    }
    return TrainSpec(
        target=ResolvedTarget(model="unused", content_id="synthetic"),
        hidden_states=inputs / "features",
        vocabulary=inputs / "vocabulary",
        draft=Eagle3Config(num_steps=3, draft_vocab_size=len(KEPT)),
        training=TrainingConfig(**config),
    )


GPU_WIDTH = 256
GPU_VOCAB_SIZE = 640
GPU_TARGET_CONFIG: dict[str, Any] = {
    "hidden_size": GPU_WIDTH,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "rope_theta": 10_000.0,
    "vocab_size": GPU_VOCAB_SIZE,
}


GPU_DRAFT_CONFIG = Eagle3Config(num_steps=4, draft_vocab_size=512, fc_norm=True, norm_output=True)
GPU_KEPT = range(64, 576)


def make_gpu_head() -> TargetHead:
    torch.manual_seed(0)
    embedding_VD, head_VD = torch.randn(2, GPU_VOCAB_SIZE, GPU_WIDTH)
    return TargetHead(embedding_VD, head_VD / GPU_WIDTH**0.5, torch.ones(GPU_WIDTH))


def make_wide_draft() -> Eagle3Draft:
    """A draft of sizes that kernels are made for, on the CPU in float32."""
    return Eagle3Draft.create(GPU_DRAFT_CONFIG, GPU_TARGET_CONFIG, make_gpu_head(), torch.tensor(GPU_KEPT), LAYERS)


def make_gpu_draft() -> Eagle3Draft:
    """The same on the GPU as the trainer sets it up."""
    draft = make_wide_draft().cuda()
    draft.compute_dtype = torch.bfloat16
    return draft


def make_gpu_spec(directory: Path, **training: Any) -> TrainSpec:
    """A training of such a draft, over features and a vocabulary that are written for it."""
    write_features(directory / "features", head=make_gpu_head(), config=GPU_TARGET_CONFIG)
    write_vocabulary(directory / "vocabulary", kept=GPU_KEPT, vocab_size=GPU_VOCAB_SIZE)
    spec = make_spec(directory, **{"learning_rate": 1e-3, **training})
    return spec.model_copy(update={"draft": GPU_DRAFT_CONFIG, "device": "cuda"})


def make_batch(documents: Sequence[tuple[int, int]], *, seed: int, width: int = GPU_WIDTH) -> DraftBatch:
    """An unprepared batch for that draft, on the CPU, of random features. Args: documents: (prompt, answer) tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [prompt + answer for prompt, answer in documents]
    loss_mask_T = torch.cat([torch.arange(sum(document)) >= document[0] for document in documents])
    # The token before each of an answer's; no document begins with its answer.
    (answer_U,) = loss_mask_T.nonzero(as_tuple=True)
    logits_UV = torch.randn(len(answer_U), GPU_VOCAB_SIZE, generator=generator)
    return DraftBatch(
        input_ids_T=torch.randint(GPU_VOCAB_SIZE, (sum(lengths),), generator=generator),
        loss_mask_T=loss_mask_T,
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        document_ids_T=torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths)),
        aux_hidden_TLD=torch.randn(sum(lengths), len(LAYERS), width, generator=generator).bfloat16(),
        teaching_U=answer_U - 1,
        last_hidden_UD=torch.randn(len(answer_U), width, generator=generator).bfloat16(),
        target_argmax_U=logits_UV.argmax(-1),
        target_logsumexp_U=logits_UV.logsumexp(-1),
    )
