"""A backend whose answers are a function of the request, and prompts in a file: what `regenerate` tests need."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from specforge_core.stages import RegenerateSpec, ResolvedData, ResolvedSource, ResolvedTarget
from specforge_core.targets import Completion, GenerationRequest, Sampling
from tests import tiny

TOKENIZER = tiny.make_tokenizer()
START, END = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])


def text_ids(text: str) -> list[int]:
    """Ids of a text by hand: the tiny tokenizer has a token a byte; a space is written as Ġ and a line end as Ċ."""
    ids: list[int] = TOKENIZER.convert_tokens_to_ids(list(text.replace(" ", "Ġ").replace("\n", "Ċ")))
    return ids


def last_question(request: GenerationRequest) -> str:
    """The text of the last user turn of a prompt."""
    text: str = TOKENIZER.decode(list(request.input_ids))
    return text.rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>", 1)[0]


class ScriptedTarget:
    """Answers `answer(question)`; an answer that has room left ends with the end-of-turn token.

    A batch is taken, waits `delay_s`, and is answered, last request first.
    """

    def __init__(self, answer: Callable[[str], str], *, delay_s: float = 0.0) -> None:
        self.answer = answer
        self.delay_s = delay_s
        self.asked: list[str] = []

    def generate(
        self, requests: Iterable[GenerationRequest], sampling: Sampling, *, batch_size: int
    ) -> Iterator[Completion]:
        pending = iter(requests)
        while batch := list(islice(pending, batch_size)):
            time.sleep(self.delay_s)
            self.asked += [request.id for request in batch]
            for request in reversed([(request, self.answer(last_question(request))) for request in batch]):
                yield self._completion(*request, sampling)

    def _completion(self, request: GenerationRequest, answer: str, sampling: Sampling) -> Completion:
        token_ids = [*text_ids(answer), END]
        if len(token_ids) > sampling.max_new_tokens:
            return Completion(request.id, tuple(token_ids[: sampling.max_new_tokens]), "length")
        return Completion(request.id, tuple(token_ids), "stop")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file of the rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_spec(prompts: Path, *, batch_size: int = 4, **data: Any) -> RegenerateSpec:
    """A spec over one JSONL file of prompts."""
    source = ResolvedSource(dataset=str(prompts), content_id="prompts")
    return RegenerateSpec(
        target=ResolvedTarget(model="scripted", content_id="scripted"),
        data=ResolvedData(sources=(source,), **data),
        batch_size=batch_size,
    )
