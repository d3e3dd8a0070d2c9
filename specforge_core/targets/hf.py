"""A target in this process: any `transformers` causal language model, on CPU or on one GPU.

B rows of a padded batch, T tokens of one document, U teaching tokens of one document, N real tokens of a batch, M of
these that teach, L captured layers, D target width, V target vocabulary.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from specforge_core.decoding.speculative import generate
from specforge_core.drafts.base import TargetHead
from specforge_core.stages import ResolvedTarget
from specforge_core.targets import CaptureRequest, Completion, GenerationRequest, Sampling, TargetFeatures
from specforge_core.targets.weights import decoder, final_norm, norm_factor, weight_files

logger = logging.getLogger(__name__)

WINDOW_BATCHES = 8
"""Documents are sorted by length within so many batches: little padding, and results wait in memory no longer."""
LOGIT_CHUNK_ELEMENTS = 2**26
"""Logits that exist at once while they are reduced: 256 MiB in float32."""
PROBE_TOKENS = 4


class HFTarget:
    """A loaded target. Weights come from safetensors only, never from a pickle."""

    def __init__(self, target: ResolvedTarget, *, device: str) -> None:
        origin = {"revision": target.revision or "main", "trust_remote_code": target.trust_remote_code}
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(target.model, **origin)
        # Asked first: the library's own words about a target of pickles alone are to load them.
        weight_files(target)
        self.model = AutoModelForCausalLM.from_pretrained(
            target.model, dtype=getattr(torch, target.dtype), use_safetensors=True, **origin
        )
        self.model.to(self.device).eval().requires_grad_(False)
        self.config = self.model.config.get_text_config()
        logger.info("loaded %s on %s in %s", target.model, self.device, target.dtype)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        num_layers: int = self.config.num_hidden_layers
        return num_layers

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer, by the generation config and by the tokenizer."""
        configured = self.model.generation_config.eos_token_id
        listed = configured if isinstance(configured, list) else [configured]
        return frozenset(token for token in [*listed, self.tokenizer.eos_token_id] if token is not None)

    @cached_property
    def decoder(self) -> nn.Module:
        """The model without its head: token ids in, the last hidden state after the final norm out."""
        return decoder(self.model, self.num_layers)

    def decoder_layers(self) -> nn.ModuleList:
        """The decoder's layers in order. Raises: ValueError if no list of modules has the right length."""
        return next(
            module
            for module in self.decoder.children()
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers
        )

    def final_norm(self) -> nn.Module | None:
        """The norm after the last layer, or None if the decoder has none of its own."""
        return final_norm(self.decoder)

    @cached_property
    def lm_head(self) -> nn.Linear:
        """The head, checked: its input is the decoder's output and its output are the logits.

        Raises: ValueError for a model that has a bias in its head, or that scales or caps around it. A draft sees
        last hidden states and the head's weight only, so it would learn another distribution than the target's.
        """
        head = self.model.get_output_embeddings()
        name = type(self.model).__name__
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise ValueError(f"{name}: the head must be a linear layer without bias, it is {head}")
        seen: dict[str, Tensor] = {}
        # Wide enough that any soft cap bends it.
        replacement = torch.linspace(-1000.0, 1000.0, head.out_features, device=self.device, dtype=head.weight.dtype)

        def watch_head(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            seen["head input"] = inputs[0]
            return replacement.expand_as(output).clone()

        def watch_decoder(module: nn.Module, inputs: Any, output: Any) -> None:
            seen["decoder output"] = output[0]

        hooks = [head.register_forward_hook(watch_head), self.decoder.register_forward_hook(watch_decoder)]
        try:
            with torch.inference_mode():
                probe = torch.arange(PROBE_TOKENS, device=self.device)[None]
                logits = self.model(input_ids=probe, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        if not torch.equal(seen["head input"], seen["decoder output"]):
            raise ValueError(f"{name} changes the last hidden state before its head (a scale?): drafts cannot do that")
        if not torch.equal(logits, replacement.expand_as(logits).to(logits.dtype)):
            raise ValueError(
                f"{name} changes its logits after its head (a scale or a soft cap?): drafts cannot do that"
            )
        return head

    def generate(
        self, requests: Iterable[GenerationRequest], sampling: Sampling, *, batch_size: int
    ) -> Iterator[Completion]:
        """Completions in the order in which they finish."""
        for generation in generate(self, requests, sampling, batch_size=batch_size):
            yield generation.completion

    def capture(
        self, requests: Iterable[CaptureRequest], layers: tuple[int, ...], *, batch_tokens: int
    ) -> Iterator[TargetFeatures]:
        """Features of each document, in order, on the target's device, hidden states in its dtype.

        Args: requests: documents of at least one token; layers: decoder layers, see `specforge_core.targets`;
        batch_tokens: size of a padded batch; a longer document is a batch of its own.
        Raises: ValueError for a layer that does not exist, or a head that `lm_head` refuses.
        """
        if unknown := [layer for layer in layers if not 0 <= layer < self.num_layers]:
            raise ValueError(f"layers {unknown} do not exist: the target has layers 0 to {self.num_layers - 1}")
        for window in _windows(requests, WINDOW_BATCHES * batch_tokens):
            features: dict[int, TargetFeatures] = {}
            for batch in _length_buckets([len(request.input_ids_T) for request in window], batch_tokens):
                captured = self._capture_batch([window[i] for i in batch], layers)
                features.update(zip(batch, captured, strict=True))
            yield from (features[i] for i in range(len(window)))

    @torch.inference_mode()
    def _capture_batch(self, requests: list[CaptureRequest], layers: tuple[int, ...]) -> list[TargetFeatures]:
        # Padding on the right: in a causal model no real token can see it, and positions count from 0.
        input_ids_BT = _padded([request.input_ids_T.long() for request in requests]).to(self.device)
        is_real_BT = _padded([torch.ones_like(request.is_teaching_T) for request in requests]).to(self.device)
        is_teaching_BT = _padded([request.is_teaching_T for request in requests]).to(self.device)
        hidden_by_layer: dict[int, Tensor] = {}
        modules = self.decoder_layers()
        hooks = [
            modules[layer].register_forward_hook(_keep_rows(hidden_by_layer, layer, is_real_BT)) for layer in layers
        ]
        try:
            output = self.decoder(input_ids=input_ids_BT, attention_mask=is_real_BT.long(), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        aux_hidden_NLD = torch.stack([hidden_by_layer[layer] for layer in layers], dim=1)
        last_hidden_MD = output.last_hidden_state[is_teaching_BT]
        argmax_M, logsumexp_M = greedy_and_normalizer(last_hidden_MD, self.lm_head.weight)
        aux_parts = aux_hidden_NLD.split([len(request.input_ids_T) for request in requests])
        num_teaching = [int(request.is_teaching_T.sum()) for request in requests]
        teaching_parts = (tensor.split(num_teaching) for tensor in (last_hidden_MD, argmax_M, logsumexp_M))
        return [TargetFeatures(*columns) for columns in zip(aux_parts, *teaching_parts, strict=True)]

    def load_target_head(self) -> TargetHead:
        """The target's embedding, head and final norm, in its dtype, on the CPU; a tied pair stays one tensor."""
        embedding_VD = self.model.get_input_embeddings().weight.detach().cpu()
        is_tied = self.lm_head.weight is self.model.get_input_embeddings().weight
        lm_head_VD = embedding_VD if is_tied else self.lm_head.weight.detach().cpu()
        norm = self.final_norm()
        factor_D = None if norm is None else norm_factor(norm, self.lm_head.weight[:1])
        return TargetHead(embedding_VD, lm_head_VD, factor_D)


def greedy_and_normalizer(last_hidden_ND: Tensor, lm_head_VD: Tensor) -> tuple[Tensor, Tensor]:
    """The greedy token (int32 [N]) and the log-sum-exp of the logits (float32 [N]), over the whole vocabulary.

    Logits are float32 sums of products of the given values, and exist for a chunk of rows at a time.
    """
    chunk_rows = max(1, LOGIT_CHUNK_ELEMENTS // len(lm_head_VD))
    argmaxes, normalizers = [], []
    for chunk_CD in last_hidden_ND.split(chunk_rows):
        logits_CV = float32_logits(chunk_CD, lm_head_VD)
        argmaxes.append(logits_CV.argmax(dim=-1).int())
        normalizers.append(logits_CV.logsumexp(dim=-1))
    return torch.cat(argmaxes), torch.cat(normalizers)


def float32_logits(hidden_ND: Tensor, lm_head_VD: Tensor) -> Tensor:
    """float32 [N, V]: products of the given values, summed and kept in float32."""
    if hidden_ND.dtype != torch.float32 and hidden_ND.is_cuda:
        return torch.mm(hidden_ND, lm_head_VD.T, out_dtype=torch.float32)
    return hidden_ND.float() @ lm_head_VD.float().T


def _padded(rows: list[Tensor]) -> Tensor:
    """[B, T], zeros behind each row."""
    return pad_sequence(rows, batch_first=True)


def _keep_rows(rows: dict[int, Tensor], layer: int, is_real_BT: Tensor) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that puts a copy of the layer's hidden states at real tokens into `rows`."""

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        # Indexing copies, so a later layer that adds in place cannot change what is kept.
        rows[layer] = (output[0] if isinstance(output, tuple) else output)[is_real_BT]

    return keep


def _windows(requests: Iterable[CaptureRequest], num_tokens: int) -> Iterator[list[CaptureRequest]]:
    """The requests in order, in lists that hold just `num_tokens` or more; the last one may hold less."""
    window: list[CaptureRequest] = []
    held_tokens = 0
    for request in requests:
        window.append(request)
        held_tokens += len(request.input_ids_T)
        if held_tokens >= num_tokens:
            yield window
            window, held_tokens = [], 0
    if window:
        yield window


def _length_buckets(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """All indices, longest first, in batches of at most `batch_tokens` when padded to their longest."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
