"""What every task family hands over: one problem, its key, and the rule that puts a key into a split."""

import hashlib
import re
from collections.abc import Callable
from random import Random
from typing import Literal, NamedTuple, TypeVar

Split = Literal["train", "heldout"]
Accepts = Callable[[str], bool]

# One key in sixteen is held out: large enough to evaluate on, small enough not to starve training.
HELDOUT_BYTES = 16


FactsT = TypeVar("FactsT")
ChoiceT = TypeVar("ChoiceT")


class Problem(NamedTuple):
    """One question with its worked answer.

    key: the facts that make the problem up, without their wording; decides the split
    final_answer: a number, or the phrase that ends the answer; None when nothing short can be checked
    """

    key: str
    question: str
    answer: str
    final_answer: str | None


Sampler = Callable[[Random, Accepts], Problem]


def split_of(key: str) -> Split:
    """The split a problem belongs to, decided by the sha256 of its key alone."""
    return "heldout" if hashlib.sha256(key.encode()).digest()[0] < HELDOUT_BYTES else "train"


def draw(sample: Callable[[], FactsT], key: Callable[[FactsT], str], accepts: Accepts) -> FactsT:
    """The first sampled facts whose key belongs to the wanted split."""
    while True:
        facts = sample()
        if accepts(key(facts)):
            return facts


def answers_match(answer: str, final_answer: str) -> bool:
    """Whether a generated answer states `final_answer` where the corpus puts it.

    A number must be the last number of the answer; a phrase must end its last line, a full stop aside.
    """
    if re.fullmatch(r"-?\d+(\.\d+)?", final_answer):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", answer)
        return bool(numbers) and numbers[-1] == final_answer
    last_line = answer.strip().rsplit("\n", 1)[-1].removesuffix(".")
    return re.search(rf"(?<!\w){re.escape(final_answer.removesuffix('.'))}$", last_line) is not None


def pick(rng: Random, *choices: ChoiceT) -> ChoiceT:
    """One of the choices, mostly wordings of the same thing."""
    return rng.choice(choices)


def capitalized(text: str) -> str:
    """The text with its first letter upper-cased and the rest as it was."""
    return text[:1].upper() + text[1:]


def listed(items: list[str] | tuple[str, ...]) -> str:
    """Items as running text: "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
