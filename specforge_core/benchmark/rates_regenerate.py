"""Regeneration against saturation: the stage's own program, and the same prompts and answers without it."""

import json
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from specforge_core.artifacts import METRICS_NAME, PROGRESS_DIRECTORY
from specforge_core.benchmark.load import flush_cache
from specforge_core.benchmark.rates_results import Pass
from specforge_core.benchmark.saturation import RawRequest, saturate
from specforge_core.benchmark.server import Server
from specforge_core.benchmark.server_flags import Options, target_options
from specforge_core.data.journal import Exchange, Journal
from specforge_core.data.regenerate import JOURNAL_NAME, regenerate
from specforge_core.manifest_sections import EngineConfig
from specforge_core.stages import RegenerateSpec, ResolvedData, ResolvedSource, ResolvedTarget
from specforge_core.targets.sglang import SGLangTarget, num_in_flight

MAX_PROMPT_TOKENS = 1024
KV_TOKENS = 2**16
"""Room for what runs at once, and for prefixes of later turns."""


class RegenerateWork(NamedTuple):
    """What is answered."""

    target: ResolvedTarget
    source: ResolvedSource
    max_new_tokens: int
    engine: EngineConfig

    @property
    def name(self) -> str:
        """In words."""
        return (
            f"{self.source.limit or 'all'} prompts of {self.source.dataset}, at most {self.max_new_tokens} new tokens"
        )

    def options(self) -> Options:
        """Of the server."""
        return {**target_options(self.target, self.engine), "--max-total-tokens": KV_TOKENS}

    def spec(self) -> RegenerateSpec:
        """Of the stage."""
        return RegenerateSpec(
            target=self.target,
            data=ResolvedData(
                sources=(self.source,), max_prompt_tokens=MAX_PROMPT_TOKENS, max_new_tokens=self.max_new_tokens
            ),
            batch_size=num_in_flight(self.engine.max_running_requests, 1),
        )


class RegenerateRates:
    """The passes of regeneration and of its limit."""

    def __init__(self, work: RegenerateWork, server: Server, scratch: Path) -> None:
        """Answers everything once, so that the limit knows what to ask, and how many tokens are answered."""
        self._spec, self._server, self._out = work.spec(), server, scratch / "regenerate"
        self._target = SGLangTarget(work.target, (server,))
        self._num_passes = 0
        self.ours()
        self._exchanges = self._journaled()

    def ours(self) -> Pass:
        """The stage, from its prompts to its conversations."""
        shutil.rmtree(self._out, ignore_errors=True)
        self._out.mkdir(parents=True)
        flush_cache(self._server)
        started_at = time.perf_counter()
        regenerate(self._spec, self._target, self._target.tokenizer, self._out)
        elapsed_s = time.perf_counter() - started_at
        metrics = json.loads((self._out / METRICS_NAME).read_text(encoding="utf-8").splitlines()[-1])
        num_tokens = metrics["regenerate/tokens"]
        return Pass(
            num_requests=len(self._journaled()),
            num_tokens=num_tokens,
            elapsed_s=elapsed_s,
            served_s=num_tokens / metrics["regenerate/tokens_per_s"],
        )

    def limit(self) -> Pass:
        """The same prompts, later turns too, and as many tokens, all asked at once."""
        self._num_passes += 1
        flush_cache(self._server)
        requests = [
            RawRequest(f"raw-{self._num_passes}-{number}", exchange.prompt_ids, len(exchange.answer_ids))
            for number, exchange in enumerate(self._exchanges)
        ]
        done = saturate(self._server.url, requests)
        return Pass(
            num_requests=len(requests),
            num_tokens=done.num_output_tokens,
            elapsed_s=done.elapsed_s,
            served_s=done.elapsed_s,
        )

    def _journaled(self) -> list[Exchange]:
        path = self._out / PROGRESS_DIRECTORY / JOURNAL_NAME
        with closing(Journal(path, key=self._spec.key())) as journal:
            return [journal[request_id] for request_id in journal]
