"""What a draft is to a server: its config, its tensors, its RoPE, and what it is loaded back from."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_core.drafts.base import TargetHead
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.drafts.eagle3_config import llama_config, rope_parameters
from specforge_core.drafts.layers import Rotary
from specforge_core.manifest_sections import Eagle3Config
from tests.drafts.synthetic import KEPT, TARGET_CONFIG, VOCAB_SIZE, as_dtype, make_document, make_draft, make_head, pack

LLAMA_31 = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
YARN = {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}


def outputs(draft: Eagle3Draft) -> Tensor:
    """Logits of step 0 of every slot, each attending to itself alone."""
    batch = pack([make_document("PPPAAA", seed=0)])
    hidden_TD = draft.fuse(batch.aux_hidden_TLD)
    qkv = draft.midlayer.project_qkv(draft.embed(batch.input_ids_T), hidden_TD, batch.position_ids_T)
    attended_TD = qkv.value_TMC.repeat_interleave(4 // qkv.value_TMC.shape[1], dim=1).flatten(1)
    return draft.logits(draft.recurrent(draft.midlayer.finish(hidden_TD, attended_TD)))


@pytest.mark.parametrize("variant", [{}, {"fc_norm": True, "norm_output": True, "num_key_value_heads": 2}], ids=str)
def test_a_draft_read_back_gives_equal_logits(variant: dict[str, Any]):
    draft = make_draft(**variant).float()
    reloaded = Eagle3Draft.from_serving(draft.serving_config(), draft.serving_state_dict(), make_head().embedding_VD)
    assert torch.equal(outputs(reloaded), outputs(draft))
    assert reloaded.serving_config() == draft.serving_config()


def read_back(change: dict[str, Tensor | None], **config: Any) -> Eagle3Draft:
    draft = make_draft()
    tensors = {name: tensor for name, tensor in (draft.serving_state_dict() | change).items() if tensor is not None}
    return Eagle3Draft.from_serving(draft.serving_config() | config, tensors, make_head().embedding_VD)


def test_missing_and_unknown_tensors_are_refused_by_name():
    weight = make_draft().midlayer.mlp.up_proj.weight.detach()
    with pytest.raises(ValueError, match=r"missing \['midlayer\.mlp\.up_proj\.weight'\], unknown \['layers\.0\.up'\]"):
        read_back({"midlayer.mlp.up_proj.weight": None, "layers.0.up": weight})
    with pytest.raises(ValueError, match=r"missing \['fc_norm\.0\.weight', 'fc_norm\.1\.weight', 'fc_norm\.2"):
        read_back({}, fc_norm=True)


def test_vocabulary_maps_that_disagree_are_refused():
    with pytest.raises(ValueError, match="d2t and t2d name different tokens"):
        read_back({"d2t": torch.zeros(len(KEPT), dtype=torch.int64)})


def test_a_target_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"embedding is \(13, 8\), .* vocab_size=14"):
        read_back({}, vocab_size=14)
    with pytest.raises(ValueError, match="target_hidden_size=16 with hidden_size=8"):
        read_back({}, target_hidden_size=16)
    with pytest.raises(ValueError, match=r"config\.json lacks head_dim, rms_norm_eps"):
        llama_config({name: 1 for name in TARGET_CONFIG if name not in ("head_dim", "rms_norm_eps")})


def test_a_draft_loaded_to_decode_cannot_be_trained():
    with pytest.raises(ValueError, match="only one made by `create` has a teacher"):
        read_back({}).double().prepare(pack([make_document("PPAAAA", seed=0)]))


def test_vocabulary_map_is_an_offset():
    draft = make_draft()
    assert draft.d2t.tolist() == [0, 1, 1, 2, 2, 3, 3, 5]  # KEPT [0, 2, 3, 5, 6, 8, 9, 12] less 0..7, by hand
    assert draft.draft_to_target(torch.tensor([[7, 0], [3, 1]])).tolist() == [[12, 0], [5, 2]]
    assert draft.t2d.nonzero().squeeze(1).tolist() == KEPT


def test_a_fresh_draft_starts_from_the_head_and_the_norm_of_its_target():
    head = make_head()
    draft = Eagle3Draft.create(
        Eagle3Config(draft_vocab_size=len(KEPT)), TARGET_CONFIG, head, torch.tensor(KEPT), (1, 3, 4)
    )
    assert torch.equal(draft.lm_head.weight, head.lm_head_VD[KEPT])
    assert torch.equal(draft.norm.weight, head.final_norm_D)
    # Neither is shared with the teacher, which must not move while the draft learns.
    assert draft.lm_head.weight.data_ptr() != draft.teacher_head.data_ptr()
    names = {name for name, _ in draft.named_parameters()}
    assert draft.serving_state_dict().keys() == names | {"d2t", "t2d"}


def test_a_bfloat16_target_gives_a_float32_draft():
    head = TargetHead(*(tensor.bfloat16() for tensor in make_head()))
    draft = Eagle3Draft.create(
        Eagle3Config(draft_vocab_size=len(KEPT)), TARGET_CONFIG, head, torch.tensor(KEPT), (1, 3, 4)
    )
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}
    batch = pack([make_document("PPAAAA", seed=0)])
    stored = as_dtype(batch, torch.bfloat16)
    assert draft(draft.prepare(stored)).loss_sum.isfinite()


def test_config_is_what_servers_read():
    head = TargetHead(torch.zeros(VOCAB_SIZE, 4096), torch.zeros(VOCAB_SIZE, 4096), None)
    config = Eagle3Config(draft_vocab_size=len(KEPT), norm_output=True, intermediate_size=64)
    found = Eagle3Draft.create(config, LLAMA_31, head, torch.tensor(KEPT), (1, 15, 28)).serving_config()
    rope = LLAMA_31["rope_scaling"]
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 4096,
        "intermediate_size": 64,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": VOCAB_SIZE,
        "draft_vocab_size": len(KEPT),
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": rope,
        "rope_parameters": {**rope, "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 15, 28], "use_aux_hidden_state": True},
        "norm_before_residual": False,
        "fc_norm": False,
        "norm_output": True,
    }
    assert {name: found[name] for name in expected} == expected


def test_default_layers_by_hand():
    assert Eagle3Draft.capture_layers(None, 32) == (1, 15, 28)
    assert Eagle3Draft.capture_layers(None, 7) == (1, 2, 3)
    assert Eagle3Draft.capture_layers((0, 2, 5), 7) == (0, 2, 5)


@pytest.mark.parametrize("layers", [None, (1, 2, 5), (3, 2, 4), (1, 1, 4), (-1, 2, 3), (1, 2)], ids=str)
def test_layers_that_a_small_target_lacks_are_refused(layers):
    # Of 6 layers a server reaches the outputs of 0 to 4, and [1, 6//2 - 1, 6 - 4] names layer 2 twice.
    with pytest.raises(ValueError, match="ascending layers from 0 to 4 of a target of 6 layers"):
        Eagle3Draft.capture_layers(layers, 6)


def rotary(head_dim: int = 128, **rope: Any) -> Rotary:
    config = {**LLAMA_31, "head_dim": head_dim, "rope_parameters": {"rope_theta": 10000.0, **rope}}
    return Rotary(llama_config(config))


def test_rope_turns_position_one_by_the_frequencies():
    # 10000^(-c/2), c = 0, 1: by hand 1 and 0.01; both halves of a head turn alike.
    cos, sin = rotary(4, rope_type="default")(torch.tensor([0, 1]))
    torch.testing.assert_close(cos, torch.tensor([[1.0] * 4, [math.cos(1), math.cos(0.01)] * 2]))
    torch.testing.assert_close(sin, torch.tensor([[0.0] * 4, [math.sin(1), math.sin(0.01)] * 2]))


def test_rope_scaling_of_llama_3_slows_low_frequencies_only():
    module = Rotary(llama_config({**LLAMA_31, "head_dim": 128, "rope_parameters": rope_parameters(LLAMA_31)}))
    # The fastest pair has a wave of 2 pi tokens, far below 8192 / 4; the slowest, of 2.5 million, is above 8192.
    assert module.inv_freq[0] == 1.0
    assert module.inv_freq[-1].item() == pytest.approx(500000.0 ** (-126 / 128) / 8, rel=1e-5)


def test_rope_of_yarn_scales_both_by_its_attention_factor():
    module = rotary(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048)
    cos, sin = module(torch.tensor([5]))
    factor = 0.1 * math.log(4.0) + 1.0  # YaRN, arXiv 2309.00071, section 3.4
    torch.testing.assert_close(cos**2 + sin**2, torch.full((1, 128), factor**2))


def test_rope_that_changes_with_the_length_is_refused():
    with pytest.raises(ValueError, match="rope_type='dynamic' is not supported"):
        rotary(rope_type="dynamic", factor=2.0)


def test_bfloat16_does_not_round_the_frequencies():
    module = rotary(rope_type="default")
    frequencies = module.inv_freq.clone()
    assert torch.equal(module.to(torch.bfloat16).inv_freq, frequencies)
    assert module.inv_freq.dtype == torch.float32
    assert not torch.equal(frequencies.bfloat16().float(), frequencies)


@pytest.mark.parametrize(
    ("target_config", "expected"),
    [
        ({"rope_theta": 5.0}, {"rope_type": "default", "rope_theta": 5.0}),
        ({"rope_theta": 5.0, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5.0}),
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.5}},
            {"rope_type": "default", "rope_theta": 5.0},
        ),
        # What Qwen2.5-VL says of images; in text all three sections count alike.
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "mrope_section": [16, 24, 24]}},
            {"rope_type": "default", "rope_theta": 5.0},
        ),
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}},
            {"rope_type": "default", "rope_theta": 5.0},
        ),
        # Kimi K2's, and gpt-oss's way of rounding.
        (
            {"rope_theta": 5.0, "rope_scaling": YARN | {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}},
            YARN | {"rope_type": "yarn", "rope_theta": 5.0},
        ),
        (
            {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 5.0, "truncate": False}},
            YARN | {"rope_type": "yarn", "rope_theta": 5.0},
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 5.0},
                    "sliding_attention": {},
                }
            },
            {"rope_type": "default", "rope_theta": 5.0},
        ),
    ],
    ids=[
        "v4",
        "v4-null",
        "v4-old-name",
        "v5-partial",
        "v5-mrope",
        "v4-mrope",
        "v4-yarn",
        "v5-yarn",
        "v5-by-layer-type",
    ],
)
def test_rope_is_read_from_either_schema(target_config: dict[str, Any], expected: dict[str, Any]):
    assert rope_parameters(target_config) == expected


def test_attention_heads_that_do_not_share_evenly_are_refused():
    config = Eagle3Config(draft_vocab_size=len(KEPT), num_key_value_heads=3)
    with pytest.raises(ValueError, match="num_attention_heads=4 is no multiple of num_key_value_heads=3"):
        Eagle3Draft.create(config, TARGET_CONFIG, make_head(), torch.tensor(KEPT), (1, 3, 4))
