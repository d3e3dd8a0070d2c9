"""KV-cached decoding of a target in this process, batched, with or without a drafter; the loop is the same.

Every pass of the target takes the last token kept, whose key and value it does not have yet, and K proposed ones after
it (K = 0 without a drafter). It keeps the proposed tokens that the target agrees to, and one more of the target's own.

    positions      0 .. P-1 | P        | P+1 .. P+K        a row with a prompt of P tokens, after its prefill
    target reads   prompt   | x[P]     | proposed
    target writes             x[P+1]   | x[P+2] ..         its own next token at each of them

A row that ends makes place for the next request at once, so that one long answer does not hold up a batch.
B rows, T tokens of a pass, L captured layers, D target width, V target vocabulary.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from specforge_core.decoding.attention import grouped
from specforge_core.decoding.drafters import Drafter, Extension
from specforge_core.decoding.kv_cache import RowCache, make_window
from specforge_core.decoding.verification import Verdict, greedy_verdicts, sampled_verdicts, target_probabilities
from specforge_core.targets import Completion, FinishReason, GenerationRequest, Sampling

if TYPE_CHECKING:
    from specforge_core.targets.hf import HFTarget


class Generation(NamedTuple):
    """A completion, and what it took.

    As in SGLang, the first token comes from the prefill, and the acceptance length of a set of requests is the sum of
    their tokens over the sum of their verification steps. A last step that is cut at an end or a limit counts in full.
    """

    completion: Completion
    num_verify_steps: int
    """Passes of the target after the prefill."""
    accepted_by_position: tuple[int, ...]
    """Verification steps that kept the proposed token at this position; tokens cut off are not counted."""
    elapsed_s: float
    """From the start of its prefill to its last token."""


def generate(
    target: "HFTarget",
    requests: Iterable[GenerationRequest],
    sampling: Sampling,
    *,
    batch_size: int,
    drafter: Drafter | None = None,
    num_steps: int = 3,
) -> Iterator[Generation]:
    """One generation a request, in the order in which they finish.

    An answer ends with an end-of-turn token, after `sampling.max_new_tokens`, or at the target's context limit; a
    prompt that fills the context alone gets an empty answer with finish reason "length". Greedy answers and sampled
    ones do not depend on the drafter (in distribution) or on the batch, but for the rounding of the target's logits.

    Args: num_steps: tokens that the drafter proposes at a time, K.
    Raises: ValueError for a target whose attention state cannot be rewound, or an empty prompt.
    """
    check_rewindable(target.config)
    loop = _Loop(target, sampling, batch_size, drafter, num_steps if drafter else 0)
    pending = iter(requests)
    try:
        for row in range(batch_size):
            yield from loop.fill(row, pending)
        while loop.rows:
            # From the last to the first, because a row that is not filled again takes the place of the last one.
            for row in reversed(loop.step()):
                yield loop.rows[row].generation()
                yield from loop.fill(row, pending)
    finally:
        loop.close()


def check_rewindable(config: Any) -> None:
    """Nothing, if every layer keeps the keys and values of all tokens. Raises: ValueError naming what does not."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        # Configs without a list of layers have the sizes that make attention local, or no attention at all.
        local = [name for name in ("sliding_window", "attention_chunk_size") if getattr(config, name, None)]
        layer_types = local or ["full_attention" if hasattr(config, "num_attention_heads") else "attention-free"]
    if unsupported := sorted(set(layer_types) - {"full_attention"}):
        raise ValueError(
            f"{config.model_type} has {', '.join(unsupported)} layers: their state cannot be rewound when a draft is "
            "rejected. Only full attention decodes in process; use a server for this target"
        )
    if getattr(config, "max_position_embeddings", None) is None:
        raise ValueError(
            f"{config.model_type} has no max_position_embeddings: positions given by id are needed; "
            "use a server for this target"
        )


@dataclass
class _Row:
    """One request being answered. The last of its tokens has no key and value in the target yet."""

    request: GenerationRequest
    token_ids: list[int]
    max_length: int
    eos_token_ids: frozenset[int]
    random: Random
    accepted_by_position: list[int]
    num_verify_steps: int = 0
    finish_reason: FinishReason | None = None
    started_at: float = field(default_factory=time.perf_counter)

    def append(self, token_ids: Iterable[int]) -> int:
        """How many of the tokens were kept: those up to an end or a limit, which sets `finish_reason`."""
        num_kept = 0
        for token_id in token_ids:
            if len(self.token_ids) >= self.max_length:
                break
            self.token_ids.append(token_id)
            num_kept += 1
            if token_id in self.eos_token_ids:
                self.finish_reason = "stop"
                return num_kept
        if len(self.token_ids) >= self.max_length:
            self.finish_reason = "length"
        return num_kept

    def generation(self) -> Generation:
        assert self.finish_reason is not None
        new_token_ids = tuple(self.token_ids[len(self.request.input_ids) :])
        return Generation(
            completion=Completion(self.request.id, new_token_ids, self.finish_reason),
            num_verify_steps=self.num_verify_steps,
            accepted_by_position=tuple(self.accepted_by_position),
            elapsed_s=time.perf_counter() - self.started_at,
        )


class _Loop:
    """The state of one `generate` call. Row i of the list is row i of every buffer."""

    def __init__(
        self, target: "HFTarget", sampling: Sampling, num_rows: int, drafter: Drafter | None, num_steps: int
    ) -> None:
        self.model = target.model
        self.eos_token_ids = frozenset(target.eos_token_ids)
        self.context_limit: int = target.config.max_position_embeddings
        self.sampling = sampling
        self.drafter = drafter
        self.num_steps = num_steps
        self.rows: list[_Row] = []
        self.cache = RowCache(num_rows, target.num_layers)
        self.aux_hidden: dict[int, Tensor] = {}
        self.hooks: list[Any] = []
        if drafter is not None:
            drafter.begin(num_rows)
            layers = target.decoder_layers()
            self.hooks = [layers[i].register_forward_hook(self._keep_output(i)) for i in drafter.aux_layers]

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _keep_output(self, layer: int) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            self.aux_hidden[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def fill(self, index: int, pending: Iterator[GenerationRequest]) -> Iterator[Generation]:
        """Put the next request into row `index`; those that end with their prefill are yielded. Without one, pop."""
        for request in pending:
            row = self.prefill(index, request)
            if row.finish_reason is None:
                self.rows[index : index + 1] = [row]
                return
            yield row.generation()
        if index < len(self.rows):
            self.pop(index)

    @torch.inference_mode()
    def pop(self, index: int) -> None:
        """Give up row `index`. The last row takes its place, so that a pass always reads neighbouring rows."""
        last_row = self.rows.pop()
        if index < len(self.rows):
            self.rows[index] = last_row
            self.cache.copy_row(len(self.rows), index)
            if self.drafter is not None:
                self.drafter.copy_row(len(self.rows), index)

    @torch.inference_mode()
    def prefill(self, index: int, request: GenerationRequest) -> _Row:
        """The row of a request whose prompt is read and whose first token is chosen.

        One prompt at a time: without padding, so that its states do not depend on its neighbours.
        """
        prompt = list(request.input_ids)
        if not prompt:
            raise ValueError(f"request {request.id!r} has an empty prompt; a target needs at least one token")
        row = _Row(
            request=request,
            token_ids=prompt,
            max_length=min(len(prompt) + self.sampling.max_new_tokens, self.context_limit),
            eos_token_ids=self.eos_token_ids,
            random=Random(f"{self.sampling.seed}/{request.id}"),
            accepted_by_position=[0] * self.num_steps,
        )
        if len(prompt) >= row.max_length:
            row.finish_reason = "length"
            return row
        logits_1TV = self._forward(index, [prompt], [0], logits_to_keep=1)
        verdict = self._verdicts(logits_1TV, [[]], [row])[0]
        row.append([verdict.next_token])
        if self.drafter is not None and row.finish_reason is None:
            self.drafter.extend(index, [Extension(0, row.token_ids[1:])], self._captured())
        return row

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The rows that end with this pass of the target, ascending."""
        starts = [len(row.token_ids) - 1 for row in self.rows]
        if self.drafter is None:
            proposed: list[list[int]] = [[] for _ in self.rows]
        else:
            proposed = self.drafter.propose([row.token_ids for row in self.rows], self.num_steps)
        input_ids = [[row.token_ids[-1], *chain] for row, chain in zip(self.rows, proposed, strict=True)]
        logits_BTV = self._forward(0, input_ids, starts)
        verdicts = self._verdicts(logits_BTV, proposed, self.rows)
        extensions = []
        for row, start, chain, verdict in zip(self.rows, starts, proposed, verdicts, strict=True):
            kept = [*chain[: verdict.num_accepted], verdict.next_token]
            extensions.append(Extension(start, kept))
            row.num_verify_steps += 1
            for position in range(min(row.append(kept), verdict.num_accepted)):
                row.accepted_by_position[position] += 1
        finished = [index for index, row in enumerate(self.rows) if row.finish_reason is not None]
        if self.drafter is not None and len(finished) < len(self.rows):
            self.drafter.extend(0, extensions, self._captured())
        return finished

    def _forward(self, first_row: int, input_ids: list[list[int]], starts: list[int], **kwargs: Any) -> Tensor:
        """Logits [B, T, V] of new tokens of neighbouring rows; their keys and values are in the cache afterwards."""
        device = self.model.device
        self.cache.window = window = make_window(
            slice(first_row, first_row + len(input_ids)),
            starts,
            len(input_ids[0]),
            context_limit=self.context_limit,
            dtype=self.model.dtype,
            device=device,
        )
        with grouped(self.model):
            output = self.model(
                input_ids=torch.tensor(input_ids, device=device),
                position_ids=window.position_ids_BT,
                attention_mask=window.mask_B1TL,
                past_key_values=self.cache,
                use_cache=True,
                **kwargs,
            )
        logits_BTV: Tensor = output.logits
        return logits_BTV

    def _captured(self) -> Tensor | None:
        """The auxiliary hidden states [B, T, L, D] of the last pass."""
        assert self.drafter is not None
        if not self.drafter.aux_layers:
            return None
        return torch.stack([self.aux_hidden[layer] for layer in self.drafter.aux_layers], dim=-2)

    def _verdicts(self, logits_BTV: Tensor, proposed: list[list[int]], rows: list[_Row]) -> list[Verdict]:
        if self.sampling.temperature == 0.0:
            return greedy_verdicts(logits_BTV, proposed)
        probabilities_BTV = target_probabilities(
            logits_BTV, temperature=self.sampling.temperature, top_p=self.sampling.top_p
        )
        return sampled_verdicts(probabilities_BTV, proposed, [row.random for row in rows])
