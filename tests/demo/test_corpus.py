"""The demo corpus: its promises about splits and form, and its answers recomputed from the prompts alone."""

import ast
import json
import re
import subprocess
import sys
from datetime import date, timedelta
from itertools import islice
from pathlib import Path

import pytest

from specforge_core.demo.corpus import FAMILIES, Conversation, answers_match, generate, split_of, write_jsonl

WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def drawn(count: int, *, family: str | None = None, split: str = "train", seed: int = 17) -> list[Conversation]:
    return list(islice(generate(split, seed=seed, family=family), count))


def first_turns(family: str, count: int) -> list[tuple[str, str, str | None]]:
    """Question, answer and final answer of single-turn conversations."""
    return [(c.messages[-2]["content"], c.messages[-1]["content"], c.final_answer) for c in drawn(count, family=family)]


def test_equal_arguments_give_equal_conversations_and_another_seed_gives_others():
    assert drawn(200) == drawn(200)
    assert drawn(200) != drawn(200, seed=18)


def test_no_heldout_problem_occurs_in_training():
    train = {key for c in drawn(2500) for key in c.keys}
    heldout = {key for c in drawn(2500, split="heldout") for key in c.keys}
    assert len(train) > 2000
    assert len(heldout) > 2000
    assert not train & heldout
    assert {split_of(key) for key in train} == {"train"}
    assert {split_of(key) for key in heldout} == {"heldout"}


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_alternate_and_the_assistant_has_the_last_word(family: str):
    for conversation in drawn(300, family=family):
        roles = [message["role"] for message in conversation.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(message["content"].strip() for message in conversation.messages)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_answer_states_its_final_answer(family: str):
    for conversation in drawn(500, family=family):
        if conversation.final_answer is not None:
            assert answers_match(conversation.messages[-1]["content"], conversation.final_answer)


def test_a_number_must_come_last_and_a_phrase_must_end_the_answer():
    assert answers_match("12 + 5 = 17.\nSo it is 17.", "17")
    assert not answers_match("12 + 5 = 17.\nSo it is 18.", "17")
    assert not answers_match("So it is 117.", "17")
    assert answers_match("Ana with red, Ben with blue. So it is Ben with blue.", "blue")
    assert not answers_match("Ana with red, Ben with blue. So it is Ana with red.", "blue")
    assert not answers_match("It is skyblue.", "blue")


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(ValueError, match=r"family='poetry'.*arithmetic"):
        next(generate("train", seed=0, family="poetry"))


def value(expression: str) -> float:
    """A sum of the corpus, computed by Python."""
    allowed = re.sub(r"[\d +*/-]", "", python := expression.replace("×", "*").replace("÷", "/"))
    assert not allowed, f"not a sum: {expression!r}"
    return eval(python)


def test_every_written_sum_is_true():
    number_of_sums = 0
    for conversation in drawn(4000):
        for message in conversation.messages:
            chains = re.findall(r"(?<![\w.])-?\d+(?: [×÷+-] \d+)*(?: = -?\d+(?: [×÷+-] \d+)*)+", message["content"])
            for chain in chains:
                assert len({value(part) for part in chain.split(" = ")}) == 1, chain
            number_of_sums += len(chains)
    assert number_of_sums > 5000


ARITHMETIC = {
    r"has (\d+) \w+ with (\d+) \w+ in each \w+\. \w+ [a-z ]+ (\d+) \w+\. How many": lambda a, b, c: a * b - c,
    r"for (\d+) hours at (\d+) km per hour and then for (\d+) hours at (\d+) km": lambda a, b, c, d: a * b + c * d,
    r"costs \$(\d+)\. \w+ gets (\d+)% off": lambda price, percent: price - price * percent // 100,
    r"has (\d+) \w+ and \w+ has (\d+)\. They put them together.* among (\d+) ": lambda a, b, c: (a + b) // c,
    r"buys (\d+) \w+ at \$(\d+) each and (\d+) \w+ at \$(\d+) each, and pays with \$(\d+)": (
        lambda a, b, c, d, paid: paid - a * b - c * d
    ),
}


def test_word_problems_are_solved_right():
    checked = dict.fromkeys(ARITHMETIC, 0)
    for question, _, final_answer in first_turns("arithmetic", 3000):
        for pattern, solve in ARITHMETIC.items():
            if match := re.search(pattern, question):
                assert final_answer == str(solve(*map(int, match.groups()))), question
                checked[pattern] += 1
    assert min(checked.values()) > 10, checked


def weekday_away(start: str, days: int, word: str) -> str:
    return WEEKDAYS[(WEEKDAYS.index(start) + (days if word == "after" else -days)) % 7]


def date_away(days: int, month: str, day: int) -> str:
    month_number = [date(2001, m, 1).strftime("%B") for m in range(1, 13)].index(month) + 1
    end = date(2001, month_number, day) + timedelta(days=days)
    return f"{end:%B} {end.day}"


def whole_and_rest(total: int, factor: int, many: str, small: str) -> str:
    whole, rest = divmod(total, factor)
    return f"{whole} {many} and {rest} {small}" if rest else f"{whole} {many}"


CONVERT = {
    r"(-?\d+) degrees Celsius": lambda c: str(round(int(c) * 1.8 + 32)),
    r"is (\d+) days (after|before) (\w+day)\?": lambda n, word, start: weekday_away(start, int(n), word),
    r"What date is (\d+) days after (\w+) (\d+)\?": lambda n, month, day: date_away(int(n), month, int(day)),
    r"How many inches are in (\d+) feet\?": lambda n: str(int(n) * 12),
    r"How many grams are in (\d+) kilograms\?": lambda n: str(int(n) * 1000),
    r"Convert (\d+) ounces to pounds": lambda n: whole_and_rest(int(n), 16, "pounds", "ounces"),
    r"Convert (\d+) days to weeks": lambda n: whole_and_rest(int(n), 7, "weeks", "days"),
    r"What time is it (\d+) hours? and (\d+) minutes after (\d+):(\d+)\?": lambda h, m, hour, minute: (
        "{}:{:02d}".format(*divmod((int(h) * 60 + int(m) + int(hour) * 60 + int(minute)) % 1440, 60))
    ),
}


def test_conversions_are_right():
    checked = dict.fromkeys(CONVERT, 0)
    for question, _, final_answer in first_turns("convert", 12000):
        for pattern, solve in CONVERT.items():
            if match := re.search(pattern, question):
                assert final_answer == solve(*match.groups()), question
                checked[pattern] += 1
    assert min(checked.values()) > 4, checked


def rows_of(question: str) -> list[dict[str, str]]:
    """The Markdown or CSV table in a prompt; none for tables in plain lines."""
    lines = [line.strip("| ").replace(" | ", ",").split(",") for line in question.split("\n") if ":" not in line]
    lines = [cells for cells in lines if len(cells) > 2 and cells[0] != "---"]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[1:]] if len(lines) > 3 else []


def table_answer(question: str) -> str | None:
    """The answer to the questions that this test knows, computed from the table in the prompt."""
    rows = rows_of(question)
    if not rows:
        return None
    name = next(iter(rows[0]))
    if match := re.search(r"total (\w+)\?", question):
        return str(sum(int(row[match[1]]) for row in rows))
    if match := re.search(r"the (highest|largest|lowest|smallest) (\w+)[?.]", question):
        pick = max if match[1] in ("highest", "largest") else min
        return pick(rows, key=lambda row: int(row[match[2]]))[name]
    if match := re.search(r"What is the (\w+) of (\w+)\?", question):
        return next(row[match[1]] for row in rows if row[name] == match[2])
    if match := re.search(r"How many rows have (\w+) above (-?\d+)\?", question):
        return str(sum(int(row[match[1]]) > int(match[2]) for row in rows))
    if match := re.search(r"How far apart are (\w+) and (\w+) in (\w+)\?", question):
        one, other = (next(int(row[match[3]]) for row in rows if row[name] == each) for each in match.groups()[:2])
        return str(abs(one - other))
    if match := re.search(r"Which rows have (\w+) as (\w+)\?", question):
        names = [row[name] for row in rows if row[match[2]] == match[1]]
        return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return None


def test_questions_about_tables_are_answered_right():
    checked = 0
    for question, _, final_answer in first_turns("table", 2000):
        if (expected := table_answer(question)) is not None:
            assert final_answer == expected, question
            checked += 1
    assert checked > 400


def test_the_python_functions_return_what_the_answers_say():
    checked = 0
    for question, answer, final_answer in first_turns("code", 1500):
        code = re.search(r"```python\n(.*?)```", answer, re.S)[1]
        example = re.findall(r'\[[\d, ]+\]|\{".*?\}|"[a-z]{3,}"', question)
        namespace: dict = {}
        exec(code, namespace)
        (function,) = (each for name, each in namespace.items() if name != "__builtins__")
        result = function(ast.literal_eval(example[-1]))
        assert repr(result).replace("'", '"') == final_answer, question
        checked += 1
    assert checked == 1500


def test_a_file_holds_one_json_conversation_a_line(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    command = [sys.executable, "-m", "specforge_core.demo.corpus", "--split", "heldout", "--family", "table"]
    subprocess.run([*command, "--count", "5", "--seed", "4", "--out", str(path)], check=True)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    expected = drawn(5, family="table", split="heldout", seed=4)
    assert [row["messages"] for row in rows] == [list(c.messages) for c in expected]
    assert [row["final_answer"] for row in rows] == [c.final_answer for c in expected]
    assert len({row["id"] for row in rows}) == 5
    write_jsonl(tmp_path / "again.jsonl", "heldout", count=5, seed=4, family="table")
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
