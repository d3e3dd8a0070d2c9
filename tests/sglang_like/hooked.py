"""`--forward-hooks` as SGLang has them, over a real model in this process.

The hooks see what they see there: modules by SGLang's names, layers that return (what they add, residual), a logits
processor that is called with the rows of several requests end to end, and requests that come in chunks.
"""

import fnmatch
import importlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from specforge_core.targets.hf import HFTarget

GATHER_S = 0.02
"""So long the first request waits for others to share its forward."""
MAX_PREFILL_TOKENS = 16384


class Layer(nn.Module):
    """A decoder layer whose result is known already."""

    def forward(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        return after - before, before


class LogitsProcessor(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.final_logit_softcapping = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = None

    def forward(self, input_ids: Tensor, hidden_states: Tensor, lm_head: nn.Module, forward_batch: Any) -> None:
        return None


class Decoder(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))


class Model(nn.Module):
    """The module tree of a causal language model in SGLang, as far as hooks are concerned."""

    def __init__(self, target: HFTarget) -> None:
        super().__init__()
        self.model = Decoder(target.num_layers)
        self.logits_processor = LogitsProcessor(target.config)


@dataclass
class Request:
    rid: str
    input_ids: Sequence[int]
    num_done: int = 0
    is_answered: threading.Event = field(default_factory=threading.Event)


class HookedForwards:
    """Computes prompts, several in one forward, and lets the hooks see it."""

    def __init__(
        self, target: HFTarget, specs: Sequence[dict[str, Any]], *, chunk_tokens: int, max_tokens: int | None
    ) -> None:
        """Args: chunk_tokens: a prompt that does not fit so many is computed in several forwards; -1: none is."""
        self._target, self._chunk_tokens = target, chunk_tokens
        self._budget = chunk_tokens if chunk_tokens > 0 else (max_tokens or MAX_PREFILL_TOKENS)
        self._model = Model(target)
        register(self._model, specs)
        self._waiting: list[Request] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def compute(self, rid: str, input_ids: Sequence[int]) -> None:
        """Return once the request was computed."""
        request = Request(rid, input_ids)
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()
        request.is_answered.wait()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                self._changed.wait(GATHER_S)
                batch = self._next_batch()
            self._forward(batch)
            with self._changed:
                for request, num_rows in batch:
                    request.num_done += num_rows
                    if request.num_done == len(request.input_ids):
                        self._waiting.remove(request)
                        request.is_answered.set()

    def _next_batch(self) -> list[tuple[Request, int]]:
        """The requests of the next forward, in order, with how many rows of each."""
        batch: list[tuple[Request, int]] = []
        room = self._budget
        for request in self._waiting:
            num_left = len(request.input_ids) - request.num_done
            num_rows = min(num_left, room) if self._chunk_tokens > 0 else num_left
            # In chunks a prompt may fill the room, as a whole it has to leave some.
            if num_rows == 0 or (batch and num_rows >= room + (self._chunk_tokens > 0)):
                break
            batch.append((request, num_rows))
            room -= num_rows
        return batch

    @torch.no_grad()
    def _forward(self, batch: Sequence[tuple[Request, int]]) -> None:
        computed = [
            self._states(request.input_ids, slice(request.num_done, request.num_done + n)) for request, n in batch
        ]
        # One more than there are layers: the embedding first. The last one is after the final norm.
        *states, last = (torch.cat(rows) for rows in zip(*computed, strict=True))
        for layer, before, after in zip(self._model.model.layers, states[:-1], states[1:], strict=True):
            layer(before, after)
        forward_batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_extend=lambda: True),
            rids=[request.rid for request, _ in batch],
            extend_seq_lens_cpu=[num_rows for _, num_rows in batch],
            extend_prefix_lens_cpu=[request.num_done for request, _ in batch],
            global_num_tokens_cpu=None,
        )
        input_ids = torch.cat([torch.tensor(request.input_ids) for request, _ in batch])
        self._model.logits_processor(input_ids, last, self._target.lm_head, forward_batch)

    def _states(self, input_ids: Sequence[int], rows: slice) -> list[Tensor]:
        """The residual stream before the first layer and after each one, and the last hidden state, of these rows."""
        states: list[Tensor] = []
        layers = self._target.decoder_layers()
        hooks = [layers[0].register_forward_pre_hook(lambda module, inputs: states.append(inputs[0][0]))]
        for layer in layers:
            hooks.append(layer.register_forward_hook(lambda module, inputs, output: states.append(_rows(output))))
        try:
            output = self._target.decoder(input_ids=torch.tensor([input_ids]), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return [state[rows] for state in (*states, output.last_hidden_state[0])]


def _rows(output: Any) -> Tensor:
    rows: Tensor = (output[0] if isinstance(output, tuple) else output)[0]
    return rows


def register(model: nn.Module, specs: Sequence[dict[str, Any]]) -> None:
    """Attach what the specs ask for: each factory is called once, its hook goes to every module that a pattern fits."""
    for spec in specs:
        module_name, _, factory_name = spec["hook_factory"].partition(":")
        hook = getattr(importlib.import_module(module_name), factory_name)(spec["config"])
        for name, module in model.named_modules():
            if any(fnmatch.fnmatch(name, pattern) for pattern in spec["target_modules"]):
                module.register_forward_hook(hook)
