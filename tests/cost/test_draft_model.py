"""Bytes and rows of a draft's training: against hand counts, the shards' format and the rows of real batches."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from specforge_core.cost.draft_model import (
    add_counts,
    count_conversation,
    cut,
    draft_shape,
    feature_bytes,
    layer_matrices,
    muon_flops,
    num_muon_parameters,
    num_parameters,
)
from specforge_core.cost.target_model import target_model
from specforge_core.data.shards import Document, FeatureIndex, FeatureWriter
from specforge_core.manifest_sections import Eagle3Config, FeatureDtype, TargetConfig, TrainingConfig
from specforge_core.targets import TargetFeatures
from specforge_core.training.bench.batch import count_rows, make_batch
from specforge_core.training.bench.lengths import Conversation, Turn
from specforge_core.training.bench.shapes import SHAPES, Shape

CONVERSATIONS: list[Conversation] = [
    (Turn(3, 6), Turn(2, 9)),
    (Turn(11, 2),),
    (Turn(0, 14), Turn(4, 3)),
    (Turn(4, 1),),
    (Turn(5, 0),),
]


def test_rows_are_those_of_a_packed_batch() -> None:
    batch = make_batch(CONVERSATIONS, SHAPES["tiny"], seed=0, device=torch.device("cpu"))
    counted = add_counts(count_conversation(conversation, 4) for conversation in CONVERSATIONS)
    assert counted == count_rows(batch, 4)


def test_a_draft_for_llama_8b_has_the_weights_counted_by_hand() -> None:
    # fc 3 x 4096^2; q 8192 x 4096, k and v 8192 x 1024 each, o 4096^2; 3 x 4096 x 14336; head 4096 x 32000.
    assert num_parameters(SHAPES["llama-3.1-8b"]) == 424_673_280


def test_muon_multiplies_as_often_as_its_five_steps_do_by_hand() -> None:
    training = TrainingConfig(optimizer="muon")
    # All but the head; of fc alone, 5 x (4 x 4096^2 x 12288 + 2 x 4096^3).
    assert num_muon_parameters(SHAPES["llama-3.1-8b"], training) == 424_673_280 - 4096 * 32_000
    assert num_muon_parameters(SHAPES["llama-3.1-8b"], TrainingConfig()) == 0
    k = 1024
    # In cubes of 1024: fc, q, k and v, o, and three of the feed-forward network; the narrower side squared.
    products = 16 * 12 + 16 * 8 + 2 * 8 + 16 * 4 + 3 * 16 * 14
    squares = 64 + 64 + 2 + 64 + 3 * 64
    assert muon_flops(SHAPES["llama-3.1-8b"]) == 5 * (4 * products + 2 * squares) * k**3


def test_muons_products_are_those_that_torch_makes() -> None:
    shape = Shape(32, 48, 4, 2, 8, 96, 64)
    matrices = [torch.nn.Parameter(torch.randn(size)) for size in layer_matrices(shape)]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    with FlopCounterMode(display=False) as counter:
        torch.optim.Muon(matrices).step()
    assert muon_flops(shape) == counter.get_total_flops()


def test_sizes_of_the_manifest_go_before_those_of_the_target() -> None:
    config = SHAPES["llama-3.1-8b"].target_config() | {"num_hidden_layers": 32}
    target = target_model(config, TargetConfig(model="any"))
    shape = draft_shape(Eagle3Config(), config, target)
    assert shape == SHAPES["llama-3.1-8b"]._replace(rope_theta=shape.rope_theta)
    shape = draft_shape(Eagle3Config(intermediate_size=8000, num_key_value_heads=4), config, target)
    assert (shape.intermediate_size, shape.num_kv_heads, shape.num_heads) == (8000, 4, 32)


def test_features_of_llama_8b_take_24_kib_a_token_and_8_more_where_it_teaches() -> None:
    assert feature_bytes(4096, "bfloat16", 1, 0) == 24 * 1024 + 5
    assert feature_bytes(4096, "bfloat16", 0, 1) == 8 * 1024 + 8
    # One byte a number, and a float32 scale for each vector.
    assert feature_bytes(4096, "float8", 1, 0) == 12 * 1024 + 3 * 4 + 5
    assert feature_bytes(4096, "float8", 0, 1) == 4 * 1024 + 4 + 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_features_take_what_a_shard_takes(tmp_path: Path, dtype: FeatureDtype) -> None:
    width, num_tokens, num_answer = 512, 300, 120
    mask_T = torch.arange(num_tokens) >= num_tokens - num_answer
    features = TargetFeatures(
        aux_hidden_TLD=torch.randn(num_tokens, 3, width, dtype=torch.bfloat16),
        last_hidden_UD=torch.randn(num_answer, width, dtype=torch.bfloat16),
        argmax_U=torch.zeros(num_answer, dtype=torch.int32),
        logsumexp_U=torch.zeros(num_answer),
    )
    writer = FeatureWriter(tmp_path, FeatureIndex(layers=(0, 1, 2), hidden_size=width, dtype=dtype))
    record = writer.write([Document("a", torch.arange(num_tokens), mask_T)], [features])
    # The rest is the header.
    assert 0 < record.size_bytes - feature_bytes(width, dtype, num_tokens, num_answer) < 2000


def test_a_long_conversation_is_cut_as_training_cuts_it() -> None:
    conversation = (Turn(3, 6), Turn(2, 9))
    assert cut(conversation, 100) == conversation
    assert cut(conversation, 10) == (Turn(3, 6), Turn(1, 0))
    assert cut(conversation, 7) == (Turn(3, 4),)
