"""An enlarged demo target computes the demo target's function, and refuses shapes that cannot.

B rows, T tokens, V vocabulary, D width; "small" is the demo target and "wide" its enlargement.
"""

import json
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from specforge_core.demo.corpus import FAMILIES, generate
from specforge_core.demo.inflate import (
    DEMO_TARGET,
    SHAPES,
    Inflation,
    Shape,
    inflate,
    logit_bound,
    place_heads,
    place_layers,
    residual_rms_bound,
)
from specforge_core.demo.inflated import inflated_target
from specforge_core.demo.target_card import generate_replies
from specforge_core.demo.target_data import load_tokenizer

SHAPE = Shape(320, 20, 768, 8, 4, 128, 2304)
SMALL = Shape(192, 16, 512, 4, 2, 64, 2048)


class Pair(NamedTuple):
    folder: Path
    small: LlamaForCausalLM
    wide: LlamaForCausalLM


def load_pair(folder: Path, dtype: torch.dtype) -> Pair:
    small, wide = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval() for path in (DEMO_TARGET, folder))
    return Pair(folder, small, wide)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("inflate") / "wide"
    inflate(SHAPE, folder, dtype=torch.float32)
    return load_pair(folder, torch.float32)


@pytest.fixture(scope="module")
def ids_BT() -> Tensor:
    """One held-out conversation and as many random tokens: the promise holds off the corpus too."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_TARGET)
    (conversation,) = islice(generate("heldout", seed=31, family="table"), 1)
    ids = tokenizer.apply_chat_template(list(conversation.messages), return_dict=True)["input_ids"]
    noise = torch.randint(2048, (len(ids),), generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.tensor(ids), noise])


def norm_in_float64(self: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """The norm's definition; transformers rounds it to float32 inside a float64 model too."""
    return self.weight * hidden / (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        pytest.param(Shape(252, 17, 512, 6, 6, 64, 2049), id="one query head each: KV heads are copied"),
        pytest.param(Shape(192, 16, 640, 4, 2, 192, 2048), id="nothing but wider heads and feed-forward"),
    ],
)
def test_logits_and_hidden_states_are_the_small_models_in_float64(
    shape: Shape, ids_BT: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    inflation = inflate(shape, tmp_path / "wide", dtype=torch.float64)
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    pair = load_pair(tmp_path / "wide", torch.float64)
    with torch.inference_mode():
        small, wide = (m(input_ids=ids_BT, output_hidden_states=True) for m in (pair.small, pair.wide))
    torch.testing.assert_close(wide.logits[..., :2048], small.logits, atol=1e-9, rtol=0)
    # hidden_states[i + 1] is the output of layer i, except that the last entry is after the final norm.
    for i, j in enumerate(inflation.layers[:-1]):
        state = wide.hidden_states[j + 1]
        torch.testing.assert_close(state[..., :192], small.hidden_states[i + 1], atol=1e-9, rtol=0)
        assert (state[..., 192:193] == inflation.constant).all()
        assert not state[..., 193:].any()
    torch.testing.assert_close(wide.hidden_states[-1][..., :192], small.hidden_states[-1], atol=1e-9, rtol=0)


def test_float32_logits_are_as_near_to_float64_as_the_small_models_own(pair: Pair, ids_BT: Tensor):
    with torch.inference_mode():
        small, wide = (m(input_ids=ids_BT).logits[..., :2048] for m in (pair.small, pair.wide))
        exact = pair.small.double()(input_ids=ids_BT).logits
        pair.small.float()
    assert (wide - exact).abs().max() <= 3 * (small - exact).abs().max()


def test_captured_layers_put_out_what_the_small_models_captured_layers_do():
    # EAGLE-3 captures [1, N//2 - 1, N - 4]: 1, 7, 12 of 16 layers, 1, 15, 28 of 32, 1, 17, 32 of 36.
    assert [place_layers(16, 32)[i] for i in (1, 7, 12, 15)] == [1, 15, 28, 31]
    assert [place_layers(16, 36)[i] for i in (1, 7, 12, 15)] == [1, 17, 32, 35]
    assert place_layers(16, 16) == tuple(range(16))
    assert all(list(place_layers(16, n)) == sorted(set(place_layers(16, n))) for n in range(16, 100))


def test_layers_between_change_nothing(pair: Pair, ids_BT: Tensor):
    with torch.inference_mode():
        states = pair.wide(input_ids=ids_BT, output_hidden_states=True).hidden_states
    added = sorted(set(range(20)) - set(place_layers(16, 20)))
    assert len(added) == 4
    assert all(torch.equal(states[j + 1], states[j]) for j in added)


@pytest.mark.slow
def test_greedy_answers_are_the_small_models(pair: Pair):
    tokenizer = load_tokenizer(pair.folder)
    conversations = [c for family in FAMILIES for c in islice(generate("heldout", seed=32, family=family), 1)]
    small, wide = (generate_replies(m, tokenizer, conversations, max_new_tokens=64) for m in (pair.small, pair.wide))
    assert wide == small
    assert max(reply.num_tokens for reply in wide) == 64


def test_added_tokens_never_win_and_have_no_probability(pair: Pair, ids_BT: Tensor):
    with torch.inference_mode():
        logits_BTV = pair.wide(input_ids=ids_BT).logits
    assert (logits_BTV[..., 2048:].amax(-1) <= logits_BTV[..., :2048].amin(-1) - 40).all()
    # At 30 times the usual temperature, too.
    assert (logits_BTV / 30).softmax(-1)[..., 2048:].sum(-1).max() < 1e-6


def test_the_bounds_behind_that_hold_with_room(pair: Pair, ids_BT: Tensor):
    seen: list[Tensor] = []
    hook = pair.small.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        logits = pair.small(input_ids=ids_BT).logits
    hook.remove()
    weights = dict(pair.small.state_dict())
    # The bound divides what the head reads by this: a loose bound would still win, but far below what bf16 resolves.
    rms = seen[0].square().mean(-1).sqrt().max().item()
    assert rms < residual_rms_bound(weights, pair.small.config) < 1000 * rms
    largest = logits.abs().max().item()
    assert largest < logit_bound(weights["lm_head.weight"], weights["model.norm.weight"]) < 10 * largest


def test_a_prompt_of_added_ids_reads_as_real_tokens(pair: Pair, ids_BT: Tensor):
    short_BT = ids_BT % 200
    with torch.inference_mode():
        real, added = (pair.wide(input_ids=ids).logits for ids in (short_BT, short_BT + 2048))
    assert torch.equal(real, added)


def test_bfloat16_agrees_as_well_as_bfloat16_rounding_lets_it(tmp_path: Path, ids_BT: Tensor):
    inflate(SHAPE, tmp_path / "wide", dtype=torch.bfloat16)
    pair = load_pair(tmp_path / "wide", torch.bfloat16)
    with torch.inference_mode():
        small, wide = (m(input_ids=ids_BT[:1]).logits[..., :2048].float() for m in (pair.small, pair.wide))
        exact = pair.small.float()(input_ids=ids_BT[:1]).logits
    assert (wide - exact).abs().mean() <= 2 * (small - exact).abs().mean()


def test_the_folder_is_a_checkpoint_that_says_whose_text_it_is(pair: Pair):
    config = json.loads((pair.folder / "config.json").read_text())
    assert Shape(*(config[name] for name in Shape._fields)) == SHAPE
    assert config["dtype"] == "float32"
    assert config["eos_token_id"] == 2
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert not config["tie_word_embeddings"]
    assert "**The text is the demo's.**" in (pair.folder / "README.md").read_text()
    said = inflated_target(pair.folder)
    assert said is not None
    assert Shape(**said.enlarged) == SHAPE
    assert Shape(**said.demo) == SMALL
    assert said.num_parameters == sum(p.numel() for p in pair.wide.parameters())
    assert inflated_target(DEMO_TARGET) is None
    index = json.loads((pair.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in pair.folder.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in pair.wide.parameters())
    assert not list(pair.folder.parent.glob("*.partial"))


def test_the_llama_shape_has_the_parameters_of_llama_8b():
    inflation = Inflation(SHAPES["llama-3.1-8b"], dtype=torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(inflation.config())
    # The number on the model's card on the Hub.
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_dim": 96}, "head_dim=96 lacks the RoPE frequencies of heads of 64; choose a multiple of 64"),
        ({"num_attention_heads": 9}, "num_attention_heads=9 is no multiple of num_key_value_heads=4"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "num_key_value_heads=3 of 1 query heads .* at least 4"),
        ({"hidden_size": 324}, "hidden_size=324 is no multiple of 8 query heads"),
        ({"num_hidden_layers": 12}, "num_hidden_layers=12 is too few .* at least 16"),
        ({"hidden_size": 192}, "hidden_size=192 cannot hold the small model; choose at least 193"),
        ({"intermediate_size": 500}, "intermediate_size=500 .* at least 512"),
        ({"vocab_size": 2000}, "vocab_size=2000 .* at least 2048"),
    ],
)
def test_a_shape_that_cannot_hold_the_small_model_is_refused(changed: dict[str, int], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        inflate(SHAPE._replace(**changed), tmp_path / "wide", dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_float16_and_an_existing_folder_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"dtype=torch\.float16"):
        Inflation(SHAPE, dtype=torch.float16)
    with pytest.raises(FileExistsError, match="exists; choose another folder"):
        inflate(SHAPE, tmp_path, dtype=torch.float32)


def test_small_heads_read_their_own_kv_head():
    # Small: query heads 0, 1 read KV head 0 and 2, 3 read 1. Wide: 0-3 read 0, 4-7 read 1, and so on.
    assert place_heads(SMALL, SHAPES["llama-3.1-8b"]).used_query_heads.tolist() == [0, 1, 4, 5]
    # One query head for each KV head: every small KV head is there twice.
    rows = place_heads(SMALL, SHAPE._replace(num_attention_heads=6, num_key_value_heads=6, head_dim=64))
    assert rows.used_query_heads.tolist() == [0, 1, 2, 3]
    assert (rows.kv_small[::64] // 64).tolist() == [0, 0, 1, 1]
