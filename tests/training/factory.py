"""Stored features of a small random target, as the stages before training would leave them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from specforge_core.artifacts import HiddenStates, Vocabulary, seal
from specforge_core.data.shards import Document, FeatureIndex, FeatureWriter, plan_shards, save_target
from specforge_core.data.vocab import VOCABULARY_NAME
from specforge_core.manifest import Eagle3Config, TrainingConfig
from specforge_core.stages import ResolvedTarget, TrainSpec
from specforge_core.targets import TargetFeatures
from tests.drafts.synthetic import KEPT, TARGET_CONFIG, VOCAB_SIZE, WIDTH, make_head

NUM_DOCUMENTS = 60
LAYERS = (1, 3, 4)


def write_features(directory: Path, *, seed: int = 0) -> None:
    """Documents of 12 to 40 tokens: a prompt of 4, then the target's greedy answer. The target is no language model,
    but the next token follows from the hidden states, so that there is something to learn.
    """
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    head = make_head()
    documents, features = [], []
    for number in range(NUM_DOCUMENTS):
        length = int(torch.randint(12, 41, (1,), generator=generator))
        last_hidden_TD = torch.randn(length, WIDTH, generator=generator)
        logits_TV = last_hidden_TD @ head.lm_head_VD.T
        argmax_T = logits_TV.argmax(-1)
        prompt_T = torch.randint(VOCAB_SIZE, (4,), generator=generator)
        documents.append(
            Document(
                id=f"document-{number}",
                input_ids_T=torch.cat((prompt_T, argmax_T[3:-1])),
                loss_mask_T=torch.arange(length) >= 4,
            )
        )
        # What slot t has to predict, x[t+2], is the favourite at t + 1, whose state the auxiliary layers foresee.
        aux_hidden_TLD = torch.stack([last_hidden_TD.roll(-shift, dims=0) for shift in (0, 1, 2)], dim=1)
        features.append(TargetFeatures(aux_hidden_TLD, last_hidden_TD, argmax_T.int(), logits_TV.logsumexp(-1)))
    lengths = [len(document.input_ids_T) for document in documents]
    writer = FeatureWriter(directory, FeatureIndex(layers=LAYERS, hidden_size=WIDTH, dtype="float32"))
    for shard in plan_shards(lengths, 600):
        writer.write([documents[i] for i in shard], [features[i] for i in shard])
    save_target(directory, TARGET_CONFIG, head)
    facts = HiddenStates(
        layers=LAYERS,
        num_target_layers=8,
        hidden_size=WIDTH,
        dtype="float32",
        num_documents=NUM_DOCUMENTS,
        num_tokens=sum(lengths),
        num_loss_tokens=sum(lengths) - 4 * NUM_DOCUMENTS,
        num_shards=len(writer.index.shards),
    )
    seal(directory, facts, stage="capture", key="features", inputs={}, elapsed_s=0.0)


def write_vocabulary(directory: Path) -> None:
    """`KEPT` as a vocabulary artifact."""
    directory.mkdir()
    t2d = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    t2d[KEPT] = True
    save_file({"d2t": torch.tensor(KEPT) - torch.arange(len(KEPT)), "t2d": t2d}, directory / VOCABULARY_NAME)
    facts = Vocabulary(draft_vocab_size=len(KEPT), target_vocab_size=VOCAB_SIZE, coverage=0.7)
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
