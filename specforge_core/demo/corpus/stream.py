"""The endless stream of conversations, and its JSON Lines form."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

from specforge_core.demo.corpus import arithmetic, convert, followup, functions, rewrite, table
from specforge_core.demo.corpus.problem import Accepts, Sampler, Split, split_of

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful assistant who shows the work.",
    "You are a patient teacher. Explain each step.",
    "Answer clearly and stop when the task is done.",
    "You help in a small office with numbers, tables and texts.",
    "You are a tutor for beginners.",
    "Be precise.",
    "You are a friendly assistant. Keep to the facts that you are given.",
)
# Real prompts seldom carry a system prompt of their own.
SYSTEM_PROMPT_SHARE = 0.25


class Conversation(NamedTuple):
    """One conversation that ends with an assistant turn.

    keys: of all problems in it; every one belongs to the same split
    final_answer: a short answer that the last turn states (see `answers_match`); None when nothing short can be checked
    """

    family: str
    messages: tuple[dict[str, str], ...]
    final_answer: str | None
    keys: tuple[str, ...]


def _single(sample: Sampler) -> Callable[[Random, Accepts], followup.Dialogue]:
    """A family of single-turn problems as one of dialogues."""

    def dialogue(rng: Random, accepts: Accepts) -> followup.Dialogue:
        problem = sample(rng, accepts)
        turn = followup.Turn(problem.question, problem.answer, problem.final_answer)
        return followup.Dialogue((problem.key,), (turn,))

    return dialogue


FAMILIES: dict[str, Callable[[Random, Accepts], followup.Dialogue]] = {
    "arithmetic": _single(arithmetic.sample),
    "convert": _single(convert.sample),
    "table": _single(table.sample),
    "rewrite": _single(rewrite.sample),
    "code": _single(functions.sample),
    "followup": followup.sample,
}


def generate(split: Split, *, seed: int, family: str | None = None) -> Iterator[Conversation]:
    """An endless stream of conversations, equal for equal arguments.

    Args: family: one of FAMILIES; None mixes all of them in equal parts.
    Raises: ValueError for an unknown family.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family={family!r} is not one of {', '.join(FAMILIES)}")
    rng = Random(f"{split}/{family}/{seed}")
    names = tuple(FAMILIES) if family is None else (family,)

    def accepts(key: str) -> bool:
        return split_of(key) == split

    while True:
        name = rng.choice(names)
        dialogue = FAMILIES[name](rng, accepts)
        messages = []
        if rng.random() < SYSTEM_PROMPT_SHARE:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        for turn in dialogue.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        yield Conversation(name, tuple(messages), dialogue.turns[-1].final_answer, dialogue.keys)


def write_jsonl(path: Path, split: Split, *, count: int, seed: int, family: str | None = None) -> None:
    """Write `count` conversations as rows of id, family, messages and final_answer."""
    with path.open("w", encoding="utf-8") as file:
        for i, conversation in enumerate(islice(generate(split, seed=seed, family=family), count)):
            row = {
                "id": f"{split}-{family or 'mixed'}-{seed}-{i}",
                "family": conversation.family,
                "messages": conversation.messages,
                "final_answer": conversation.final_answer,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
