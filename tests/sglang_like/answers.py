"""Who answers: a made-up target that costs nothing, or a real one in this process."""

import argparse
import itertools
import json
import random
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

ONE_IN = 16
"""The scripted target ends its answer after a token with this chance."""
VOCAB_SIZE, EOS_TOKEN_ID, CONTEXT_LENGTH = 256, 0, 4096
"""Of the scripted target where the model path has no `config.json`."""


class Answer(NamedTuple):
    """New tokens, and what it took."""

    token_ids: list[int]
    finish_reason: dict[str, Any]
    num_verify_steps: int
    histogram: list[int]
    """Verification steps that accepted 0, 1, .. draft tokens."""


class Answers(Protocol):
    """What stands behind `/generate`."""

    vocab_size: int
    context_length: int

    def answer(self, rid: str, input_ids: Sequence[int], sampling: dict[str, Any]) -> Answer: ...


def model_config(model_path: str) -> dict[str, Any]:
    """The folder's `config.json`; empty without one."""
    path = Path(model_path) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class ScriptedAnswers:
    """A target whose next token is a checksum of all tokens before: the same prefix always goes on in the same way.

    A checksum decides too how many tokens of its make-believe draft are accepted, so drafting changes no answer.
    """

    def __init__(self, model_path: str, *, num_draft_steps: int) -> None:
        config = model_config(model_path)
        self.vocab_size = config.get("vocab_size", VOCAB_SIZE)
        self.context_length = config.get("max_position_embeddings", CONTEXT_LENGTH)
        eos = config.get("eos_token_id", EOS_TOKEN_ID)
        self._eos_token_id = eos[0] if isinstance(eos, list) else eos
        self._num_draft_steps = num_draft_steps

    def answer(self, rid: str, input_ids: Sequence[int], sampling: dict[str, Any]) -> Answer:
        checksum = 0
        for token_id in input_ids:
            checksum = zlib.crc32(token_id.to_bytes(4, "little"), checksum)
        if sampling.get("temperature", 1.0) > 0:
            checksum ^= sampling.get("sampling_seed") or random.getrandbits(32)
        limit = min(sampling.get("max_new_tokens", 128), self.context_length - len(input_ids))
        token_ids: list[int] = []
        while len(token_ids) < limit:
            token_ids.append(self._token(checksum, may_end=not sampling.get("ignore_eos", False)))
            checksum = zlib.crc32(token_ids[-1].to_bytes(4, "little"), checksum)
            if token_ids[-1] == self._eos_token_id:
                break
        stopped = bool(token_ids) and token_ids[-1] == self._eos_token_id
        histogram = self._draft(token_ids)
        return Answer(token_ids, finish_reason(stopped, token_ids), sum(histogram), histogram)

    def _token(self, checksum: int, *, may_end: bool) -> int:
        if may_end and checksum % ONE_IN == 0:
            return self._eos_token_id
        token_id = (checksum >> 8) % (self.vocab_size - 1)
        return token_id + (token_id >= self._eos_token_id)

    def _draft(self, token_ids: Sequence[int]) -> list[int]:
        """The histogram. The first token comes from the prefill, each step gives the accepted ones and one more."""
        if not self._num_draft_steps:
            return []
        histogram = [0] * (self._num_draft_steps + 1)
        done = 1
        while done < len(token_ids):
            accepted = zlib.crc32(bytes(str(token_ids[:done]), "ascii")) % (self._num_draft_steps + 1)
            histogram[accepted] += 1
            done += accepted + 1
        return histogram


class ModelAnswers:
    """The target of a folder, one request at a time, with an EAGLE-3 draft if there is one."""

    def __init__(self, args: argparse.Namespace, *, num_draft_steps: int) -> None:
        # Seconds of imports that a scripted server does without.
        from specforge_core.decoding.eagle3_drafter import load_eagle3_drafter
        from specforge_core.stages import ResolvedTarget
        from specforge_core.targets.hf import HFTarget

        dtype = "float32" if args.dtype in (None, "auto") else args.dtype
        self._target = HFTarget(ResolvedTarget(model=args.model_path, content_id="served", dtype=dtype), device="cpu")
        draft_path = getattr(args, "speculative_draft_model_path", None)
        self._drafter = load_eagle3_drafter(Path(draft_path), self._target) if draft_path else None
        self._num_draft_steps = num_draft_steps
        self._lock = threading.Lock()
        self._forwards = None
        if getattr(args, "forward_hooks", None):
            from tests.sglang_like.hooked import HookedForwards

            assert args.disable_radix_cache, "this server has no cache that a hook would not see"
            self._forwards = HookedForwards(
                self._target,
                json.loads(args.forward_hooks),
                chunk_tokens=args.chunked_prefill_size or -1,
                max_tokens=args.max_prefill_tokens,
            )
        self.vocab_size = self._target.config.vocab_size
        self.context_length = self._target.config.max_position_embeddings

    def answer(self, rid: str, input_ids: Sequence[int], sampling: dict[str, Any]) -> Answer:
        from specforge_core.decoding.speculative import generate
        from specforge_core.targets import GenerationRequest, Sampling

        if self._forwards is not None:
            self._forwards.compute(rid, input_ids)
        if sampling.get("max_new_tokens") == 0:
            return Answer([], finish_reason(False, []), 0, [])
        wanted = Sampling(
            max_new_tokens=sampling.get("max_new_tokens", 128),
            temperature=sampling.get("temperature", 1.0),
            top_p=sampling.get("top_p", 1.0),
            seed=sampling.get("sampling_seed") or 0,
        )
        request = GenerationRequest(rid, list(input_ids))
        with self._lock:
            ((completion, num_verify_steps, accepted, _),) = generate(
                self._target,
                [request],
                wanted,
                batch_size=1,
                drafter=self._drafter,
                num_steps=self._num_draft_steps,
            )
        # Of a chain, position k is accepted in all steps that accept more than k tokens.
        at_least = [num_verify_steps, *accepted, 0]
        histogram = [more - fewer for more, fewer in itertools.pairwise(at_least)] if self._drafter else []
        token_ids = list(completion.token_ids)
        return Answer(
            token_ids, finish_reason(completion.finish_reason == "stop", token_ids), num_verify_steps, histogram
        )


def finish_reason(stopped: bool, token_ids: Sequence[int]) -> dict[str, Any]:
    """As the server writes it."""
    return {"type": "stop", "matched": token_ids[-1]} if stopped else {"type": "length", "length": len(token_ids)}
