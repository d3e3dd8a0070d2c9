"""Sums written one operation a step, and the styles in which a worked answer is told."""

from random import Random
from typing import NamedTuple

from specforge_core.demo.corpus.problem import capitalized


class Step(NamedTuple):
    """One operation: what it is for, as a verb phrase, and the written sum."""

    aim: str
    sum: str


def times(a: int, b: int) -> str:
    """The written product; factors above one digit are split at the tens or hundreds of the longer one."""
    if min(a, b) > 10 or max(a, b) > 99:
        split, kept = (b, a) if b <= a <= 99 or b > 99 else (a, b)
        unit = 100 if split > 99 else 10
        high, low = split // unit * unit, split % unit
        if low and high:
            parts = f"{kept} × {high} + {kept} × {low} = {kept * high} + {kept * low}"
            return f"{a} × {b} = {parts} = {a * b}"
    return f"{a} × {b} = {a * b}"


def plus(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}"


def minus(a: int, b: int) -> str:
    return f"{a} - {b} = {a - b}"


def divide(a: int, b: int) -> str:
    return f"{a} ÷ {b} = {a // b}"


def _numbered(steps: tuple[Step, ...], end: str) -> str:
    lines = [f"Step {i}: {capitalized(step.aim)}. {step.sum}" for i, step in enumerate(steps, 1)]
    return "\n".join([*lines, f"So {end}."])


def _list(steps: tuple[Step, ...], end: str) -> str:
    lines = [f"{i}. {capitalized(step.aim)}: {step.sum}" for i, step in enumerate(steps, 1)]
    return "\n".join([*lines, f"{capitalized(end)}."])


def _prose(steps: tuple[Step, ...], end: str) -> str:
    links = ["First,", "Then", "After that,", "Finally,"]
    text = " ".join(f"{link} {step.aim}: {step.sum}." for link, step in zip(links, steps, strict=False))
    return f"{text} So {end}."


def _reasons(steps: tuple[Step, ...], end: str) -> str:
    lines = [f"To {step.aim}, work out {step.sum}." for step in steps]
    return "\n".join([*lines, f"This means that {end}."])


def _final_line(steps: tuple[Step, ...], end: str) -> str:
    lines = [f"We {step.aim}: {step.sum}." for step in steps]
    return "\n".join(["Let's work it out.", *lines, f"Answer: {end}."])


STYLES = (_numbered, _list, _prose, _reasons, _final_line)
# Wishes that a prompt may add, and the style that honours them.
WISHES = (
    (" Number the steps.", _numbered),
    (" Show your steps in a list.", _list),
    (" Explain in a short paragraph.", _prose),
    (" Explain why you do each step.", _reasons),
    (" Finish with a line that starts with Answer.", _final_line),
)


def written_out(rng: Random, steps: tuple[Step, ...], end: str) -> tuple[str, str]:
    """A wish to append to the question, often empty, and the steps told in a style that honours it."""
    wish, style = rng.choice(WISHES) if rng.random() < 0.3 else ("", rng.choice(STYLES))
    return wish, style(steps, end)
