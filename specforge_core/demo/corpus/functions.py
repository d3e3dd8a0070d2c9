"""Small Python functions with an explanation and a worked call."""

import json
from collections.abc import Callable
from itertools import accumulate
from random import Random
from typing import NamedTuple

from specforge_core.demo.corpus.problem import Accepts, Problem, draw, listed, pick
from specforge_core.demo.corpus.words import FRUIT_AND_MORE

Values = tuple[int, ...]


class Part(NamedTuple):
    """One building block: its words, its Python expression over `n` or `kept`, and what it does."""

    words: str
    code: str
    apply: Callable[..., int | bool]


def random_filter(rng: Random) -> Part:
    """A condition on one number `n`."""
    k = rng.randint(2, 20)
    return pick(
        rng,
        Part("even", "n % 2 == 0", lambda n: n % 2 == 0),
        Part("odd", "n % 2 == 1", lambda n: n % 2 == 1),
        Part(f"greater than {k}", f"n > {k}", lambda n: n > k),
        Part(f"less than {k}", f"n < {k}", lambda n: n < k),
        Part(f"at least {k}", f"n >= {k}", lambda n: n >= k),
        Part(f"not equal to {k}", f"n != {k}", lambda n: n != k),
        Part(f"divisible by {k % 8 + 3}", f"n % {k % 8 + 3} == 0", lambda n: n % (k % 8 + 3) == 0),
    )


def random_map(rng: Random) -> Part:
    """A change made to one number `n`."""
    k = rng.randint(2, 9)
    return pick(
        rng,
        Part("", "n", lambda n: n),
        Part("doubled", "n * 2", lambda n: n * 2),
        Part(f"plus {k}", f"n + {k}", lambda n: n + k),
        Part(f"times {k}", f"n * {k}", lambda n: n * k),
        Part("squared", "n * n", lambda n: n * n),
    )


REDUCERS = (
    Part("sum", "sum", lambda values: sum(values)),
    Part("largest", "max", lambda values: max(values)),
    Part("smallest", "min", lambda values: min(values)),
    Part("count", "len", lambda values: len(values)),
)
PARAMETERS = ("numbers", "values", "items", "data", "nums")


class Task(NamedTuple):
    """A function over a list of integers: keep what passes, change it, and reduce it to one number."""

    keep: Part
    change: Part
    reduce: Part
    values: Values

    def results(self) -> list[int]:
        return [int(self.change.apply(n)) for n in self.values if self.keep.apply(n)]


def random_task(rng: Random) -> Task:
    """A task whose example list keeps at least one number."""
    while True:
        values = tuple(rng.randint(1, 24) for _ in range(rng.randint(3, 6)))
        task = Task(random_filter(rng), random_map(rng), rng.choice(REDUCERS), values)
        if task.results():
            return task


def task_key(task: Task) -> str:
    """The key of a list task: its three expressions and the example."""
    return f"code|{task.keep.code}|{task.change.code}|{task.reduce.code}|{task.values}"


def wanted(task: Task) -> str:
    """What the function returns, in words: "the sum of the even numbers, each doubled"."""
    change = f", each {task.change.words}" if task.change.words else ""
    return f"the {task.reduce.words} of the numbers that are {task.keep.words}{change}"


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def source(rng: Random, task: Task, name: str, parameter: str) -> str:
    """The function's code, as a comprehension or as a loop."""
    expression = f"[{task.change.code} for n in {parameter} if {task.keep.code}]"
    if rng.random() < 0.5:
        return f"def {name}({parameter}):\n    kept = {expression}\n    return {task.reduce.code}(kept)"
    body = f"for n in {parameter}:\n        if {task.keep.code}:\n            kept.append({task.change.code})"
    return f"def {name}({parameter}):\n    kept = []\n    {body}\n    return {task.reduce.code}(kept)"


def explained(rng: Random, task: Task) -> str:
    """How the example call comes to its result."""
    kept = [n for n in task.values if task.keep.apply(n)]
    results, final = task.results(), int(task.reduce.apply(task.results()))
    check = rng.choice((f"It keeps the numbers that are {task.keep.words}", f"The check is {task.keep.code}"))
    example = f"From {list(task.values)} it keeps {kept}"
    if task.change.words:
        example += f", and each one {task.change.words} gives {results}"
    finish = {"sum": "Their sum", "max": "The largest", "min": "The smallest", "len": "The count"}[task.reduce.code]
    work = f"{additions(results)} " if task.reduce.code == "sum" and len(results) > 1 else ""
    return f"{check}. {example}. {work}{finish} is {final}, so the call returns {final}."


def additions(values: list[int]) -> str:
    """The sum of at least two values, one addition a sentence."""
    totals = list(accumulate(values))
    return " ".join(f"{total} + {value} = {total + value}." for total, value in zip(totals, values[1:], strict=False))


def random_name(rng: Random, task: Task) -> str:
    verb = rng.choice(("get", "find", "compute", "calc"))
    return pick(
        rng,
        f"{verb}_{task.reduce.words}",
        f"{task.reduce.words}_of_numbers",
        f"filtered_{task.reduce.words}",
        "solve",
        "process",
    )


def _numbers(rng: Random, accepts: Accepts) -> Problem:
    task = draw(lambda: random_task(rng), task_key, accepts)
    name, parameter = random_name(rng, task), rng.choice(PARAMETERS)
    example = list(task.values)
    question = pick(
        rng,
        f"Write a Python function {name}({parameter}) that returns {wanted(task)}. What does it return for {example}?",
        f"I need a function named {name} in Python. It takes a list called {parameter} and returns {wanted(task)}. "
        f"Explain it with the example {example}.",
        f"Code {name}({parameter}) in Python: it should give {wanted(task)}. Show the result for {example}.",
    )
    answer = f"{block(source(rng, task, name, parameter))}\n\n{explained(rng, task)}"
    return Problem(task_key(task), question, answer, str(int(task.reduce.apply(task.results()))))


# What can be done to a word: (words, expression over `text`, function)
TEXT_TASKS = (
    ("the text in upper case", "text.upper()", lambda text, letter: text.upper()),
    ("the text with its first letter in upper case", "text.capitalize()", lambda text, letter: text.capitalize()),
    ("the length of the text", "len(text)", lambda text, letter: len(text)),
    ('how often "{letter}" occurs in the text', 'text.count("{letter}")', lambda text, letter: text.count(letter)),
    ('the text without any "{letter}"', 'text.replace("{letter}", "")', lambda text, letter: text.replace(letter, "")),
    (
        'whether the text starts with "{letter}"',
        'text.startswith("{letter}")',
        lambda text, letter: text.startswith(letter),
    ),
    ('whether the text ends with "{letter}"', 'text.endswith("{letter}")', lambda text, letter: text.endswith(letter)),
    ('the text with "{letter}" in front', '"{letter}" + text', lambda text, letter: letter + text),
    ("the text twice in a row", "text * 2", lambda text, letter: text * 2),
    ("the first three letters of the text", "text[:3]", lambda text, letter: text[:3]),
)


def _text(rng: Random, accepts: Accepts) -> Problem:
    """A one-line function over a text, with the example spelled out letter by letter."""

    def facts() -> tuple[int, str, str]:
        index, text = rng.randrange(len(TEXT_TASKS)), rng.choice(FRUIT_AND_MORE)
        # A letter that the task does not use must not make a second key for the same facts.
        letter = rng.choice((rng.choice(text), rng.choice("abcdefghilmnoprstu"))) if "{" in TEXT_TASKS[index][0] else ""
        return index, text, letter

    def key(drawn: tuple[int, str, str]) -> str:
        return f"code|text|{drawn}"

    drawn = draw(facts, key, accepts)
    index, text, letter = drawn
    words, code, apply = TEXT_TASKS[index]
    words, code, value = words.format(letter=letter), code.format(letter=letter), apply(text, letter)
    result = json.dumps(value) if isinstance(value, str) else str(value)
    name = rng.choice(("change", "check", "text_tool", "solve", "handle_text", "inspect_text", "convert"))
    note = rng.choice(
        ("    # one expression is enough\n", "", f'    """Return {words}."""\n' if '"' not in words else "")
    )
    question = pick(
        rng,
        f'Write a Python function {name}(text) that returns {words}. What is {name}("{text}")?',
        f'How can a Python function named {name} return {words}? Try it on "{text}".',
    )
    spelled = f'The letters of "{text}" are {", ".join(text)}.'
    if isinstance(value, str):
        spelled += f" Those of the result are {', '.join(value)}."
    elif isinstance(value, bool):
        spelled += f" It starts with {text[0]} and ends with {text[-1]}."
    answer = block(f"def {name}(text):\n{note}    return {code}")
    return Problem(key(drawn), question, f'{answer}\n\n{spelled} So {name}("{text}") returns {result}.', result)


def _dictionary(rng: Random, accepts: Accepts) -> Problem:
    """A function over a dictionary of prices."""

    def facts() -> tuple[tuple[str, ...], Values, int, str]:
        size, want = rng.randint(3, 5), rng.choice(("cheap", "dear", "best", "total"))
        limit = rng.randint(3, 36) if want in ("cheap", "dear") else 0
        return tuple(rng.sample(FRUIT_AND_MORE, size)), tuple(rng.sample(range(1, 40), size)), limit, want

    def key(drawn: tuple[tuple[str, ...], Values, int, str]) -> str:
        return f"code|dictionary|{drawn}"

    drawn = draw(facts, key, accepts)
    items, prices, limit, want = drawn
    stock = dict(zip(items, prices, strict=True))
    shown = "{" + ", ".join(f'"{item}": {price}' for item, price in stock.items()) + "}"
    parameter = rng.choice(("prices", "costs", "stock", "menu"))
    if want in ("cheap", "dear"):
        sign, words = ("<", "below") if want == "cheap" else (">", "above")
        kept = [item for item, price in stock.items() if (price < limit if want == "cheap" else price > limit)]
        task, result = f"the names of all entries {words} {limit}", "[" + ", ".join(f'"{item}"' for item in kept) + "]"
        code = f"[name for name, value in {parameter}.items() if value {sign} {limit}]"
        verdicts = [f"{price} {'keeps' if item in kept else 'rules out'} {item}" for item, price in stock.items()]
        work = f"Against {limit}, {listed(verdicts)}. What is kept is {listed(kept) if kept else 'nothing'}"
    elif want == "best":
        best = max(stock, key=lambda item: stock[item])
        task, code, result = "the name with the highest value", f"max({parameter}, key={parameter}.get)", f'"{best}"'
        work = f"The highest value is {stock[best]}"
    else:
        task, code, result = "the sum of all values", f"sum({parameter}.values())", str(sum(prices))
        work = additions(list(prices))[:-1]
    name = rng.choice(("select", "query", "lookup", "answer", "solve", "report"))
    question = pick(
        rng,
        f"Write a Python function {name}({parameter}) for a dictionary. It returns {task}. Try it on {shown}.",
        f"Given a dictionary such as {shown}, write {name}({parameter}) that returns {task}. What is the result?",
    )
    code = block(f"def {name}({parameter}):\n    return {code}")
    return Problem(key(drawn), question, f"{code}\n\n{work}. So the call returns {result}.", result)


TASKS = (_numbers, _numbers, _numbers, _text, _dictionary)


def sample(rng: Random, accepts: Accepts) -> Problem:
    """A programming task of a random kind."""
    return rng.choice(TASKS)(rng, accepts)
