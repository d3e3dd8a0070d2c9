"""Answer checking, on forms written by hand, on looping completions, and on every row of real data sets."""

import json
import time
from pathlib import Path

import pytest

from specforge_core.benchmark.answers import check_answer, last_boxed, reference_answer

REAL_DATA = Path(__file__).parents[3] / "shared/data"


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("The answer is 42.", "42"),
        ("6 * 7 = 42 dollars", "42"),
        ("She has **42** eggs", "#### 42"),
        ("It costs $1,234.50", "1234.5"),
        (r"\boxed{\$1{,}234.50}", "1,234.50"),
        ("#### 1,000,000", "1000000"),
        ("It fell to -3", "-3"),
        ("It fell to \u22123 degrees.", "-3"),
        ("The loss is -$5", "-5"),
        ("a range of 3-4", "4"),
        ("16 - 3", "3"),
        ("- 3 apples", "3"),
        ("1.5e3", "1500"),
        ("3/4 of it", "0.75"),
        ("1 1/2 cups", "1.5"),
        (r"$\frac{3}{4}$", "3/4"),
        ("50%", "50"),
        ("1\u202f234", "1234"),
        ("18.00", "18"),
        (".5", "0.5"),
        ("Answer: 18 (9 eggs at $2)", "18"),
        ("The answer is 5 + 3 = 8", "8"),
        ("The final answer is:\n\n**18** dollars, from 9 eggs", "18"),
        ("The answer is 7. No, the answer is 8. I am 100% sure", "8"),
        ("#### Step 1\n2 + 2 = 4", "4"),
        ("9 * 2 = 18\n#### 18", "text with 5 numbers <<1+1=2>>\n#### 18"),
    ],
)
def test_a_right_number_is_right_however_it_is_written(completion: str, reference: str) -> None:
    assert check_answer("number", completion, reference)


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("", "42"),
        ("I do not know", "42"),
        ("42 or 43", "42"),
        ("3", "-3"),
        ("-3", "3"),
        ("1,234", "234"),
        ("on day 2 300 people came", "2300"),
        ("The answer is 420.", "42"),
        ("The answer is 4.2", "42"),
        ("0.749999", "3/4"),
        ("1/0", "1"),
        ("9" * 5000, "9"),
    ],
)
def test_a_wrong_number_is_wrong(completion: str, reference: str) -> None:
    assert not check_answer("number", completion, reference)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac{1}{2}", r"\frac12"),
        (r"\tfrac12", "1/2"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"1\frac{1}{2}", r"\frac{3}{2}"),
        (r"\frac{\sqrt{3}}{3}", r"\dfrac{\sqrt3}3"),
        (r"\frac{\pi}{2}", r"\pi/2"),
        (r"50\%", "50"),
        (r"90^\circ", "90 degrees"),
        (r"90^{\circ}", "90"),
        (r"5.4 \text{ cents}", "5.4"),
        (r"3\text{ cm}^2", "3 square units"),
        ("10,080", r"10{,}080"),
        (r"10,\!080", "10080"),
        (r"\$18.90", "18.9"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("(3, 0.5)", r"\left(3, \frac{1}{2}\right)"),
        (r"\left\{1, 2\right\}", r"\{2,1\}"),
        ("1, -2", "-2,1"),
        ("x=5", "5"),
        ("f(x) = 2x", "2x"),
        (r"x \in [1,2]", "[1, 2]"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "C"),
        (r"11\sqrt{2}", r"11 \sqrt 2"),
        ("x^{2} - y", "x^2-y"),
        ("2516_8", "2516_{8}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
)
def test_math_answers_that_differ_in_layout_only_are_equal(one: str, other: str) -> None:
    assert check_answer("math", rf"So $x$ is \boxed{{{one}}}.", other)
    assert check_answer("math", rf"So $x$ is \boxed{{{other}}}.", one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("(3,4)", "(4,3)"),
        ("(3,4]", "(3,4)"),
        ("(1,234)", "1234"),
        ("2x", "2"),
        ("1,2", "12"),
        (r"\frac{1}{2}", r"\frac{2}{1}"),
        (r"\sqrt{2}", "2"),
        (r"2\pi", "2"),
        ("2 pi", "2"),
        ("6 or 7", "6"),
        ("x^2", "x2"),
        (r"\text{A}", "a"),
        ("3!", "3"),
        ("__import__('os')", "0"),
    ],
)
def test_math_answers_that_differ_in_meaning_are_not_equal(one: str, other: str) -> None:
    assert not check_answer("math", rf"\boxed{{{one}}}", other)
    assert not check_answer("math", rf"\boxed{{{other}}}", one)


@pytest.mark.parametrize(
    "completion",
    [
        r"First \boxed{1}, then \boxed{\frac{p}{q+1}}. Done.",
        r"\boxed{\boxed{\frac{p}{q+1}}} and an unclosed \boxed{\frac{1",
        r"Final Answer: The final answer is $\frac{p}{q+1}$. I hope it is correct.",
        r"The answer is \frac{p}{q+1}. It is in lowest terms",
        r"It costs $5, so $7 in all, hence \[x = \frac{p}{q+1}\]",
        r"As $p = 1$, we get $$\frac{p}{q+1}$$",
    ],
)
def test_the_final_answer_of_a_solution_is_found(completion: str) -> None:
    assert check_answer("math", completion, r"\frac{p}{q+1}")


def test_a_full_solution_can_be_the_reference() -> None:
    assert check_answer("math", "The answer is 12", r"We add $5$ and $7$ to get $\boxed{12}$.")


def test_the_last_box_is_the_innermost_closed_one() -> None:
    assert last_boxed(r"\boxed{1} \boxed{a{b}\}c} \boxed{2") == r"a{b}\}c"
    assert last_boxed(r"\boxed{x \boxed{y} z}") == "y"
    assert last_boxed(r"no box, } {") is None


@pytest.mark.parametrize(
    "completion",
    [
        "B",
        "(B)",
        "B) 12 km",
        "The answer is B.",
        "A car needs 12 hours, so the correct option is (B).",
        "**Answer: B**",
        "Answer:\n\nB",
        "the correct answer is option B) 12",
        "I compared A) with B)",
        r"\boxed{\text{(B)}}",
        "The answer is B. Option A is the distance.",
        "12 km\nB",
    ],
)
def test_the_chosen_letter_is_found(completion: str) -> None:
    assert check_answer("choice", completion, "B")
    assert not check_answer("choice", completion, "A")


def test_an_article_is_no_choice() -> None:
    assert not check_answer("choice", "A car needs 12 hours. I think so.", "A")
    assert not check_answer("choice", "Answer: Aachen", "A")


@pytest.mark.parametrize(
    ("kind", "reference"),
    [("number", "twelve"), ("number", ""), ("number", "3 or 4"), ("math", " "), ("choice", "12"), ("choice", "AB")],
)
def test_a_reference_of_another_kind_is_refused(kind, reference: str) -> None:
    with pytest.raises(ValueError, match=f"is no reference answer of kind '{kind}'; name another column"):
        reference_answer(kind, reference)


@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1,",
        "111,",
        "1/",
        r"\boxed{",
        "{",
        "(1,",
        "answer is ",
        "$",
        r"\(",
        r"\frac{",
        r"\text{",
        "1 ",
        "cm ",
        "#### ",
    ],
)
def test_a_looping_completion_is_wrong_within_a_moment(piece: str) -> None:
    looping = piece * (60_000 // len(piece))
    start = time.perf_counter()
    for completion in (looping, rf"\boxed{{{looping}}}", f"The answer is {looping}", f"${looping}$"):
        assert not check_answer("number", completion, "12345")
        assert not check_answer("math", completion, "12345")
        assert not check_answer("choice", completion, "B")
    # The time is linear: a quadratic scan takes minutes. The limit leaves room for a busy machine.
    assert time.perf_counter() - start < 10


NUMBER_PHRASES = (
    "{}",
    "The answer is {}.",
    "So the total is = {} dollars.",
    r"$$x = \boxed{{{}}}$$ as 2 < 3",
    "We get\n#### {}",
    "Answer: ${}.",
    "First 3 + 4 = 7.\nThe final answer is **{}**. 5 apples remain.",
)
LETTER_PHRASES = ("{}", "({})", "The answer is {}.", "A car. So **Answer: {}) 42**", r"\boxed{{\text{{({})}}}}")


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no folder of real prompts at {REAL_DATA}")
def test_every_real_reference_checks_as_right_and_another_answer_as_wrong() -> None:
    gsm8k = [json.loads(line)["answer"] for line in (REAL_DATA / "gsm8k/test.jsonl").open(encoding="utf-8")]
    svamp = [str(row["Answer"]) for row in json.loads((REAL_DATA / "svamp/SVAMP.json").read_text(encoding="utf-8"))]
    assert (len(gsm8k), len(svamp)) == (1319, 1000)
    for reference in gsm8k + svamp:
        assert check_answer("number", reference, reference)
        short = reference.split("####")[-1].strip()
        # Every reference has at most two decimals, and a thousands separator or none.
        other = str(float(short.replace(",", "")) + 1)
        for phrase in NUMBER_PHRASES:
            assert check_answer("number", phrase.format(short), reference), phrase.format(short)
            assert not check_answer("number", phrase.format(other), reference), phrase.format(other)
    aqua = [
        json.loads(line)["correct"]
        for split in ("dev", "test")
        for line in (REAL_DATA / f"aqua/{split}.json").open(encoding="utf-8")
    ]
    assert len(aqua) == 508
    for reference in aqua:
        for letter in "ABCDE":
            for phrase in LETTER_PHRASES:
                assert check_answer("choice", phrase.format(letter), reference) == (letter == reference), phrase
