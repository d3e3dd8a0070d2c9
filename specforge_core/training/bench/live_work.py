"""What `live.py` beside this serves and trains: documents of random tokens, and all that the stage `train` reads."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig

from specforge_core.artifacts import file_sha256, seal, write_atomically
from specforge_core.benchmark.rates_capture import ALGORITHM, SPARE_TOKENS, make_work, with_context
from specforge_core.data import vocab
from specforge_core.data.shards import INDEX_NAME, Document, FeatureIndex, ShardRecord, load_index, save_target
from specforge_core.drafts import ALGORITHMS
from specforge_core.facts import Conversations, HiddenStates, Record
from specforge_core.manifest_sections import Eagle3Config, FeatureDtype, ParallelConfig, TrainingConfig
from specforge_core.stages import LiveSource, ResolvedTarget, TrainSpec, UnmeasuredEngine, VocabularySpec
from specforge_core.targets.capture import portable_config, supervised_documents
from specforge_core.targets.weights import TargetFiles
from specforge_core.training.train import REPORTS_PER_RUN

UNPINNED = "measured where it lies"
STEPS_PER_REPORT = 8
"""Of `metrics.jsonl`. The training is planned for so many more than are measured that it never comes to its end."""
EVAL_FRACTION = 0.1


class LiveWork(NamedTuple):
    """What all three are about."""

    spec: TrainSpec
    """Of the training on live features."""
    documents: list[Document]
    name: str
    """In words."""

    @property
    def num_tokens(self) -> int:
        return sum(len(document.input_ids_T) for document in self.documents)

    @property
    def num_loss_tokens(self) -> int:
        return sum(int(document.loss_mask_T.sum()) for document in self.documents)


def make_live_work(arguments: argparse.Namespace, scratch: Path) -> LiveWork:
    """All that the stage `train` reads but for features, in `scratch`. Raises: ValueError for sizes that do not fit."""
    target = ResolvedTarget(model=str(arguments.target.absolute()), content_id=UNPINNED, dtype=arguments.dtype)
    config = AutoConfig.from_pretrained(target.model, trust_remote_code=False).get_text_config()
    made = make_work(
        arguments.lengths,
        arguments.share,
        num_tokens=arguments.tokens,
        vocab_size=config.vocab_size,
        directory=scratch / "conversations",
    )
    longest = max(made.lengths)
    target = with_context(target, config, longest + SPARE_TOKENS, scratch / "target")
    num_training = max(1, arguments.num_gpus - arguments.serve_gpus)
    tokens_per_batch = arguments.micro_batch * (num_training // arguments.cp)
    spec = TrainSpec(
        target=target,
        hidden_states=scratch / "features",
        vocabulary=scratch / "vocabulary",
        conversations=made.conversations,
        draft=Eagle3Config(
            num_steps=arguments.ttt_steps, draft_vocab_size=min(arguments.draft_vocab, config.vocab_size)
        ),
        training=TrainingConfig(
            num_epochs=-(-REPORTS_PER_RUN * STEPS_PER_REPORT * tokens_per_batch // sum(made.lengths)),
            tokens_per_batch=tokens_per_batch,
            tokens_per_micro_batch=arguments.micro_batch,
            max_document_tokens=longest,
            parallel=ParallelConfig(cp=arguments.cp),
            eval_fraction=EVAL_FRACTION,
            evals_per_run=1,
            checkpoints_per_run=1,
        ),
        device="cuda" if arguments.num_gpus else "cpu",
        num_processes=num_training,
        live=LiveSource(
            engine=UnmeasuredEngine(
                name=arguments.engine, python=arguments.python, tensor_parallel=arguments.tensor_parallel
            ),
            serve_gpus=arguments.serve_gpus,
            buffer_gib=arguments.buffer_gib,
        ),
    )
    work = LiveWork(spec, list(supervised_documents(made.conversations, longest)), made.name)
    _write_inputs(work, arguments.features)
    return work


def _write_inputs(work: LiveWork, dtype: FeatureDtype) -> None:
    """The artifacts around the conversations, of features only what they will be."""
    spec = work.spec
    assert spec.conversations is not None
    facts = Conversations(
        num_conversations=len(work.documents),
        num_tokens=work.num_tokens,
        num_loss_tokens=work.num_loss_tokens,
        num_failed=0,
        num_cut_off=0,
        chat_template_sha256=UNPINNED,
    )
    _seal(spec.conversations, facts, "regenerate")
    spec.vocabulary.mkdir()
    vocabulary = VocabularySpec(
        target=spec.target, conversations=spec.conversations, draft_vocab_size=spec.draft.draft_vocab_size
    )
    _seal(spec.vocabulary, vocab.main(vocabulary, spec.vocabulary), "vocabulary")
    target = TargetFiles(spec.target)
    layers = ALGORITHMS[ALGORITHM].capture_layers(spec.draft.aux_layers, target.num_layers)
    index = FeatureIndex(layers=layers, hidden_size=target.config.hidden_size, dtype=dtype)
    spec.hidden_states.mkdir()
    save_target(spec.hidden_states, portable_config(target.config), target.load_target_head())
    write_atomically(spec.hidden_states / INDEX_NAME, index.model_dump_json())


def seal_features(work: LiveWork, first_pass: Sequence[Sequence[int]]) -> None:
    """Make an artifact of the shards that were kept."""
    directory = work.spec.hidden_states
    records = []
    for number, places in enumerate(first_pass):
        documents = [work.documents[i] for i in places]
        path = directory / shard_name(number)
        records.append(
            ShardRecord(
                name=path.name,
                size_bytes=path.stat().st_size,
                sha256=file_sha256(path),
                num_documents=len(documents),
                num_tokens=sum(len(document.input_ids_T) for document in documents),
                num_loss_tokens=sum(int(document.loss_mask_T.sum()) for document in documents),
            )
        )
    index = load_index(directory).model_copy(update={"shards": tuple(records)})
    write_atomically(directory / INDEX_NAME, index.model_dump_json())
    facts = HiddenStates(
        layers=index.layers,
        num_target_layers=TargetFiles(work.spec.target).num_layers,
        hidden_size=index.hidden_size,
        dtype=index.dtype,
        num_documents=len(work.documents),
        num_tokens=work.num_tokens,
        num_loss_tokens=work.num_loss_tokens,
        num_shards=len(records),
    )
    _seal(directory, facts, "capture")


def shard_name(number: int) -> str:
    """Of the file that keeps item `number`."""
    return f"shard-{number:05d}.safetensors"


def _seal(directory: Path, facts: Record, stage: str) -> None:
    seal(directory, facts, stage=stage, key=UNPINNED, inputs={}, elapsed_s=0.0)
