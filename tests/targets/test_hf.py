"""T tokens of a document, U teaching tokens of it, L captured layers, D target width, V target vocabulary."""

import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specforge_core.stages import ResolvedTarget
from specforge_core.targets import CaptureRequest, GenerationRequest, Sampling, TargetFeatures, hf
from specforge_core.targets.hf import HFTarget, float32_logits, greedy_and_normalizer
from specforge_core.targets.weights import TargetFiles
from tests import tiny
from tests.pickle_bomb import plant

ALL_LAYERS = tuple(range(tiny.NUM_LAYERS))
# Not sorted, with equal neighbours, one token alone, and one document longer than a whole batch of 64 tokens.
LENGTHS = (5, 17, 3, 90, 17, 1, 22, 40)


class Exact(NamedTuple):
    """The same model in float64, run by `transformers` on one document."""

    layer_outputs_TLD: Tensor
    last_hidden_TD: Tensor
    logits_TV: Tensor


@pytest.fixture(scope="module")
def target(tiny_target: ResolvedTarget) -> HFTarget:
    return HFTarget(tiny_target, device="cpu")


@pytest.fixture(scope="module")
def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 259, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def requests(documents: list[Tensor]) -> list[CaptureRequest]:
    """The documents, some of whose tokens teach: of the second one none, of the sixth the only one."""
    generator = torch.Generator().manual_seed(1)
    teaching = [torch.rand(length, generator=generator) < 0.6 for length in LENGTHS]
    teaching[1][:] = False
    teaching[5][:] = True
    return [CaptureRequest(*request) for request in zip(documents, teaching, strict=True)]


def whole(document_T: Tensor) -> CaptureRequest:
    """A document of which every token teaches."""
    return CaptureRequest(document_T, torch.ones_like(document_T, dtype=torch.bool))


def run(model: Any, document_T: Tensor) -> Exact:
    """What the model gives for one document without any code of ours but one hook.

    `hidden_states[i + 1]` is the output of layer i, but for the last layer, where it is already normed.
    """
    last_layer_output: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda module, inputs, output: last_layer_output.append(output))
    with torch.no_grad():
        output = model(document_T[None], output_hidden_states=True)
    hook.remove()
    layer_outputs = [*output.hidden_states[1:-1], last_layer_output[0]]
    return Exact(torch.stack([layer[0] for layer in layer_outputs], 1), output.hidden_states[-1][0], output.logits[0])


@pytest.fixture(scope="module")
def exact(target: HFTarget, documents: list[Tensor]) -> list[Exact]:
    model = copy.deepcopy(target.model).double()
    return [run(model, document_T) for document_T in documents]


def worst(values: Tensor, exact_values: Tensor) -> float:
    return (values.double() - exact_values).abs().max().item()


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_features_are_those_of_a_plain_run_however_documents_are_batched(
    target: HFTarget, requests: list[CaptureRequest], exact: list[Exact], batch_tokens: int
):
    features = list(target.capture(requests, ALL_LAYERS, batch_tokens=batch_tokens))
    assert [len(captured.aux_hidden_TLD) for captured in features] == list(LENGTHS)
    for (document_T, teaches_T), captured, truth in zip(requests, features, exact, strict=True):
        assert len(captured.last_hidden_UD) == len(captured.argmax_U) == len(captured.logsumexp_U) == teaches_T.sum()
        plain = run(target.model, document_T)
        # Twice the rounding error that float32 has without our code; 1e-6 where that happens to be nothing.
        assert worst(captured.aux_hidden_TLD, truth.layer_outputs_TLD) <= 2 * worst(plain[0], truth[0]) + 1e-6
        if teaches_T.any():
            plain_error = worst(plain.last_hidden_TD, truth.last_hidden_TD)
            assert worst(captured.last_hidden_UD, truth.last_hidden_TD[teaches_T]) <= 2 * plain_error + 1e-6


def test_head_times_last_hidden_are_the_logits_and_their_argmax_and_normalizer_are_stored(
    target: HFTarget, requests: list[CaptureRequest], exact: list[Exact], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hf, "LOGIT_CHUNK_ELEMENTS", 7 * 259)
    head = target.load_target_head()
    features = target.capture(requests, (1,), batch_tokens=128)
    for request, captured, truth in zip(requests, features, exact, strict=True):
        logits_UV = truth.logits_TV[request.is_teaching_T]
        torch.testing.assert_close((captured.last_hidden_UD @ head.lm_head_VD.T).double(), logits_UV, rtol=0, atol=1e-4)
        assert captured.argmax_U.tolist() == logits_UV.argmax(-1).tolist()
        torch.testing.assert_close(captured.logsumexp_U.double(), logits_UV.exp().sum(-1).log(), rtol=0, atol=1e-4)
        assert (captured.argmax_U.dtype, captured.logsumexp_U.dtype) == (torch.int32, torch.float32)


def test_the_head_sees_teaching_tokens_only(
    target: HFTarget, requests: list[CaptureRequest], monkeypatch: pytest.MonkeyPatch
):
    num_rows = []

    def counted(last_hidden_ND: Tensor, lm_head_VD: Tensor) -> tuple[Tensor, Tensor]:
        num_rows.append(len(last_hidden_ND))
        return greedy_and_normalizer(last_hidden_ND, lm_head_VD)

    monkeypatch.setattr(hf, "greedy_and_normalizer", counted)
    list(target.capture(requests, (1,), batch_tokens=128))
    assert sum(num_rows) == sum(int(request.is_teaching_T.sum()) for request in requests) < sum(LENGTHS)


def test_layers_come_in_the_order_asked_for(target: HFTarget, requests: list[CaptureRequest]):
    forward = next(target.capture(requests[:1], (1, 4), batch_tokens=64))
    backward = next(target.capture(requests[:1], (4, 1), batch_tokens=64))
    assert torch.equal(forward.aux_hidden_TLD.flip(1), backward.aux_hidden_TLD)


def test_a_padded_batch_is_within_its_budget_unless_one_document_is_over_it(
    tiny_target: ResolvedTarget, requests: list[CaptureRequest]
):
    target = HFTarget(tiny_target, device="cpu")
    shapes = []
    target.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    list(target.capture(requests, (0,), batch_tokens=64))
    # Longest first: 90 alone; 40 alone, since 2 x 40 > 64; 22 and 17; 17, 5 and 3, and without 1, since 4 x 17 > 64.
    assert [shape for shape in shapes if shape != (1, hf.PROBE_TOKENS)] == [(1, 90), (1, 40), (2, 22), (3, 17), (1, 1)]


def test_documents_are_read_window_by_window(target: HFTarget):
    num_read = 0

    def endless():
        nonlocal num_read
        while True:
            num_read += 1
            yield whole(torch.tensor([1, 2, 3, 4]))

    features = target.capture(endless(), (0,), batch_tokens=8)
    assert isinstance(next(features), TargetFeatures)
    assert num_read == 16  # eight batches of two documents


def test_logits_of_bfloat16_weights_keep_float32_precision():
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(50, 64, generator=generator).bfloat16()
    lm_head_VD = torch.randn(300, 64, generator=generator).bfloat16()
    exact_NV = hidden_ND.double() @ lm_head_VD.double().T
    # A sum of 64 products of size about 1; rounding the logits to bfloat16 would cost up to 0.06.
    assert worst(float32_logits(hidden_ND, lm_head_VD), exact_NV) < 64 * 1e-6


def test_end_of_turn_comes_from_generation_config_and_tokenizer(tiny_target: ResolvedTarget):
    target = HFTarget(tiny_target, device="cpu")
    target.model.generation_config.eos_token_id = [3, 4]
    assert target.eos_token_ids == {3, 4, target.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    target = HFTarget(tiny_target, device="cpu")
    target.model.generation_config.eos_token_id = None
    assert target.eos_token_ids == {target.tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_generate_answers_every_request_as_transformers_would(target: HFTarget):
    requests = [GenerationRequest(id=str(i), input_ids=list(range(10 + i, 20 + 2 * i))) for i in range(3)]
    completions = {c.id: c for c in target.generate(requests, Sampling(max_new_tokens=8), batch_size=2)}
    for request in requests:
        prompt_T = torch.tensor([request.input_ids])
        expected_T = target.model.generate(prompt_T, max_new_tokens=8, do_sample=False)[0, prompt_T.shape[1] :]
        assert completions[request.id].token_ids == tuple(expected_T.tolist())


def make_target(directory: Path, model_type: str, **options: Any) -> HFTarget:
    """A random model of another architecture, with norms that are not all ones."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        **{"vocab_size": 259, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, **sizes, **options},
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    tiny.make_tokenizer().save_pretrained(directory)
    return HFTarget(tiny.resolved(directory), device="cpu")


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4},
    "gpt_oss": {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 16},
    # Its get_decoder() gives the whole model, head included.
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 96, "num_key_value_heads": 2, "head_dim": 16},
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_other_architectures_need_no_code_of_their_own(tmp_path: Path, model_type: str):
    target = make_target(tmp_path, model_type, **ARCHITECTURES[model_type])
    head = target.load_target_head()
    document_T = torch.arange(2, 32)
    with torch.no_grad():
        output = target.model(document_T[None], output_hidden_states=True)
    # The second document makes the first one padded.
    captured = next(target.capture([whole(document_T), whole(torch.arange(2, 37))], (0, 2), batch_tokens=100))
    assert len(target.decoder_layers()) == 4
    for j, layer in enumerate((0, 2)):
        torch.testing.assert_close(
            captured.aux_hidden_TLD[:, j], output.hidden_states[layer + 1][0], rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(captured.last_hidden_UD @ head.lm_head_VD.T, output.logits[0], rtol=1e-4, atol=1e-4)
    assert (head.lm_head_VD is head.embedding_VD) == bool(target.config.tie_word_embeddings)


def test_final_norm_weight_is_the_factor_applied_not_the_number_stored(tmp_path: Path, target: HFTarget):
    gemma = make_target(tmp_path / "gemma", "gemma", **ARCHITECTURES["gemma"])
    torch.testing.assert_close(gemma.load_target_head().final_norm_D, 1 + gemma.model.model.norm.weight)
    assert torch.equal(target.load_target_head().final_norm_D, target.model.model.norm.weight)
    layer_norm = make_target(tmp_path / "gpt2", "gpt2", **ARCHITECTURES["gpt2"])
    assert layer_norm.load_target_head().final_norm_D is None


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 16}, "changes its logits after its head"),
        ("granite", {"num_key_value_heads": 2, "logits_scaling": 8.0}, "changes its logits after its head"),
        ("phi", {}, "without bias"),
    ],
)
def test_heads_that_a_draft_cannot_follow_are_refused(
    tmp_path: Path, model_type: str, options: dict[str, Any], reason: str
):
    target = make_target(tmp_path, model_type, **options)
    with pytest.raises(ValueError, match=reason):
        next(target.capture([whole(torch.tensor([1, 2]))], (0,), batch_tokens=8))
    with pytest.raises(ValueError, match=reason):
        target.load_target_head()


def test_scaled_hidden_states_before_the_head_are_refused(tiny_target: ResolvedTarget):
    target = HFTarget(tiny_target, device="cpu")
    target.model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    with pytest.raises(ValueError, match="before its head"):
        target.load_target_head()


def test_a_layer_that_does_not_exist_is_refused(target: HFTarget, requests: list[CaptureRequest]):
    with pytest.raises(ValueError, match=r"layers \[8\] do not exist: the target has layers 0 to 7"):
        next(target.capture(requests, (1, 8), batch_tokens=64))


def test_an_unknown_decoder_is_refused_with_what_was_found(tiny_target: ResolvedTarget):
    target = HFTarget(tiny_target, device="cpu")
    target.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"no list of 5 decoder layers .* \{'layers': 8\}"):
        target.decoder_layers()


def test_pickled_weights_are_refused(tiny_target_dir: Path, tmp_path: Path):
    for path in tiny_target_dir.iterdir():
        if path.suffix == ".json" or path.suffix == ".jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    plant(tmp_path / "pytorch_model.bin", tmp_path / "ran")
    target = tiny.resolved(tmp_path)
    for load in (partial(HFTarget, device="cpu"), lambda target: TargetFiles(target).load_target_head()):
        with pytest.raises(OSError, match=r"model\.safetensors.* safetensors alone.* make a copy with"):
            load(target)
    assert not (tmp_path / "ran").exists()


@pytest.mark.gpu
def test_bfloat16_capture_on_a_gpu_agrees_with_the_cpu(tiny_target: ResolvedTarget, requests: list[CaptureRequest]):
    spec = tiny_target.model_copy(update={"dtype": "bfloat16"})
    on_cpu = HFTarget(spec, device="cpu").capture(requests, (1, 4), batch_tokens=128)
    on_gpu = HFTarget(spec, device="cuda").capture(requests, (1, 4), batch_tokens=128)
    for expected, captured in zip(on_cpu, on_gpu, strict=True):
        # Eight layers of bfloat16 rounding, in another order of summation.
        torch.testing.assert_close(captured.last_hidden_UD.cpu(), expected.last_hidden_UD, rtol=0.05, atol=0.3)
        torch.testing.assert_close(captured.logsumexp_U.cpu(), expected.logsumexp_U, rtol=0.02, atol=0.3)
