r"""Whether a completion's final answer is the reference answer: numbers, MATH answers, letters of a multiple choice.

Both sides are brought to one written form and compared as texts; nothing is evaluated or executed. So an answer that is
right in another form (`2x + 4` for `2(x + 2)`) counts as wrong, and the share of right answers is a lower bound.

What counts as the final answer: the last `\boxed{...}`; else what follows the last "the answer is"; else the last
number (of a MATH answer: the last formula, if there is one). A number may have a currency, a percent sign or a unit,
which do not count. Its thousands are separated by commas or no-break spaces; a plain space separates two numbers,
because "on day 2 300 people came" says two.
"""

import re
from collections.abc import Callable
from fractions import Fraction

from specforge_core.manifest_sections import AnswerKind

# A looping target writes digits without end, which nobody asked for and which take quadratic time to convert.
MAX_NUMBER_CHARACTERS = 60
# Far above any answer of MATH; brackets in a longer text could nest deeper than Python's stack.
MAX_MATH_CHARACTERS = 400

# Every part is bounded or consumes what it scans, so that the time stays linear in the length of a looping completion.
NUMBER = r"""
    (?P<sign>(?<![\w)\]}])[-−–])?
    (?:\\?[$€£])?
    (?:
        (?:(?P<whole>\d+)\ )?(?P<numerator>\d+)/(?P<denominator>0*[1-9]\d*)
      | (?P<decimal>(?:\d{1,3}(?:,\d{3}){1,12}(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE](?P<exponent>[-+]?\d{1,2})(?!\d))?
    )
"""
ANSWER_IS = r"\b[Aa](?i:nswer)[\s*_]*(?:(?i:is|equals)\b|[:=])"
ANY_NUMBER = re.compile(NUMBER, re.VERBOSE)
WHOLE_NUMBER = re.compile(rf"{NUMBER}\Z", re.VERBOSE)
# A heading of the fourth level starts with the same mark: only a line that holds nothing else is GSM8K's last.
GSM8K_LAST_LINE = re.compile(rf"^[ ]*\#\#\#\#[^\w.\n−–-]*{NUMBER}[^\w\n]*$", re.VERBOSE | re.MULTILINE)
# The first number of "the answer is 5 + 3 = 8" is not the answer.
STATED_NUMBER = re.compile(
    rf"{ANSWER_IS}[\s*_:=(\\\[$]*?(?>{NUMBER})(?!\s*[-+*/×÷=^−]\s*[\d($])",
    re.VERBOSE,
)
STATED_ANSWER = re.compile(rf"{ANSWER_IS}[\s*_:]*(.+)")
# As in Pandoc, a dollar sign with a space at its inner side, or a digit after it, is money.
FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|(?<![\\$])\$(?=\S)([^$\n]*[^\s$\\])\$(?!\d)|\\[(\[]((?:[^\\$]|\\[^()\[\]])+)\\[)\]]"
)

LETTER = r"(?<![A-Za-z'’])([A-J])(?![A-Za-z'’])"
# In the order of trust; of each the last match counts. A bare "A" is an article unless it stands alone.
STATED_LETTERS = (
    re.compile(rf"{ANSWER_IS}(?i:\s+(?:the\s+)?(?:option|choice|letter)\b)?\W{{0,20}}{LETTER}"),
    re.compile(rf"\b(?i:(?:ans(?:wer)?|option|choice)\b(?:\s+is\b)?)[^\w\n]{{0,8}}{LETTER}"),
    re.compile(r"(?:\A|\n)[^\w\n]*([A-J])[\W_]*\Z"),
    re.compile(r"\A[\W_]*([A-J])[).:]"),
    re.compile(r"(?<!\w)\(?([A-J])\)"),
)

TEXT_COMMAND = r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
# Written without a number before them these words are the answer, or part of it.
UNIT_WORDS = r"(?:\s+(?!(?:pi|or|and|to|sqrt)\b)[A-Za-z]{2,}\b\.?)+"
POWER = r"(?:\s*\^\s*\{?[23]\}?|[²³])?"
# The whole, a value and its unit: `5\text{ cm}^2`, `12 square units`, `5 \mathrm{m}`.
LATEX_UNIT = re.compile(rf"(?<=[\d}})])\s*{TEXT_COMMAND}{POWER}\s*\Z")
PLAIN_UNIT = re.compile(rf"(?<=[\d}})]){UNIT_WORDS}{POWER}\s*\Z")


def check_answer(kind: AnswerKind, completion: str, reference: str) -> bool:
    r"""Whether the completion's final answer is the reference.

    Args: kind: `number` (GSM8K, SVAMP), `math` (MATH: LaTeX) or `choice` (a letter); completion: the target's text;
    reference: the data set's: a bare answer, one after `####`, or one in a `\boxed{...}`.
    Raises: ValueError if the reference is none of its kind.
    """
    return FINAL_ANSWERS[kind](completion) == reference_answer(kind, reference)


def reference_answer(kind: AnswerKind, reference: str) -> str:
    """The normal form of a data set's answer. Raises: ValueError if it is none of its kind."""
    answer = REFERENCES[kind](reference.rpartition("####")[2].strip())
    if not answer:
        raise ValueError(
            f"{reference[-80:]!r} is no reference answer of kind {kind!r}; name another column or another kind "
            f"({', '.join(REFERENCES)})"
        )
    return answer


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` that is closed, braces matched; the innermost of nested ones."""
    opened: list[int | None] = []
    boxes: list[tuple[int, int]] = []
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text):
        if token[0] == "}":
            start = opened.pop() if opened else None
            if start is not None:
                boxes.append((start, token.start()))
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append(None if token[0] == "{" else token.end())
    if not boxes:
        return None
    start, end = max(boxes)
    return text[start:end]


def _number(match: re.Match[str] | None) -> str | None:
    """The exact value of a NUMBER, as an integer or a fraction in lowest terms."""
    if match is None or len(match[0]) > MAX_NUMBER_CHARACTERS:
        return None
    if match["decimal"]:
        value = Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    else:
        value = int(match["whole"] or 0) + Fraction(int(match["numerator"]), int(match["denominator"]))
    return str(-value if match["sign"] else value)


def _last_number(text: str) -> str | None:
    return _number(_last(ANY_NUMBER, _plain_numbers(text)))


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return max(pattern.finditer(text), key=re.Match.start, default=None)


def _plain_numbers(text: str) -> str:
    """The text with LaTeX's and typographic ways to write a number replaced by plain ones."""
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[,!]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\\[dtc]?frac(?![A-Za-z])\s*", r"\\frac", text)
    text = re.sub(r"\\frac(\w|\\[a-z]+)", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})\s*(\w)", r"\1{\2}", text)
    text = re.sub(r"(?<=\d)\s?\\frac\{(\d+)\}\{(\d+)\}", r" \1/\2", text)
    return re.sub(r"\\frac\{([-−]?\d+)\}\{(\d+)\}", r"\1/\2", text)


def _final_number(completion: str) -> str | None:
    boxed = last_boxed(completion)
    if boxed is not None and (number := _last_number(boxed)):
        return number
    text = _plain_numbers(completion)
    return _number(_last(GSM8K_LAST_LINE, text) or _last(STATED_NUMBER, text) or _last(ANY_NUMBER, text))


def _final_math(completion: str) -> str | None:
    boxed = last_boxed(completion)
    if boxed is not None:
        return _normal_math(boxed)
    stated = _last(STATED_ANSWER, completion)
    if stated:
        formula = FORMULA.search(stated[1])
        sentence = re.split(r"\.(?:\s|$)", stated[1], maxsplit=1)[0]
        return _normal_math(_content(formula) if formula else sentence)
    formula = _last(FORMULA, completion)
    return _normal_math(_content(formula)) if formula else _last_number(completion)


def _content(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None)


def _reference_math(text: str) -> str | None:
    boxed = last_boxed(text)
    return _normal_math(text if boxed is None else boxed)


def _final_letter(completion: str) -> str | None:
    boxed = re.search(LETTER, _without_text_commands(last_boxed(completion) or ""))
    matches = (_last(pattern, completion) for pattern in STATED_LETTERS)
    match = boxed or next((match for match in matches if match), None)
    return match[1] if match else None


def _reference_letter(text: str) -> str | None:
    match = re.fullmatch(r"\(?([A-Ja-j])[).]?", text)
    return match[1].upper() if match else None


def _without_text_commands(text: str) -> str:
    return re.sub(TEXT_COMMAND, r"\1", text)


def _normal_math(answer: str) -> str | None:
    """One written form for the answers that differ in layout, units, fractions and separators only."""
    if len(answer) > MAX_MATH_CHARACTERS:
        return None
    text = re.sub(r"\\(?:left|right|[bB]ig[lr]?|displaystyle)(?![A-Za-z])", "", answer)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b|°|\\?%|\\\$|\*\*|\$|(?<!\\)\\[()\[\]]", "", text)
    text = _plain_numbers(re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text))
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"(?<!\\)\\[,;:! ]|\\q?quad\b|~", " ", text).strip().rstrip(".").rstrip()
    text = _without_text_commands(PLAIN_UNIT.sub("", LATEX_UNIT.sub("", text)))
    if len(re.findall(r"=|\\in\b", text)) == 1:
        text = re.sub(r"^\s*\\?[A-Za-z]\w*(?:_\{\w+\})?(?:\s*\(\w\))?\s*(?:=|\\in\b)", "", text)
    text = text.strip()
    if number := _number(WHOLE_NUMBER.match(text)):
        return number
    compact = re.sub(r"\s+", "", text)
    parts = re.fullmatch(r"(\\\{|[(\[]|)(.*?)(\\\}|[)\]]|)", compact, re.DOTALL)
    assert parts is not None
    elements = _split_at_commas(parts[2])
    if len(elements) > 1:
        normal = [_normal_math(element) or "" for element in elements]
        # Only brackets give an order; several solutions without any are a set.
        return parts[1] + ",".join(normal if parts[1] in ("(", "[") else sorted(normal)) + parts[3]
    return _normal_expression(compact)


def _normal_expression(text: str) -> str:
    """A single expression without spaces."""
    # Choices are written as \text{(C)}, and words with and without a capital.
    if choice := re.fullmatch(r"\(([A-J])\)", text):
        return choice[1]
    if re.fullmatch(r"[A-Za-z]{3,}", text):
        return text.lower()
    return re.sub(r"\A(-?)\\frac\{(\w+|\\[a-z]+)\}\{(\w+|\\[a-z]+)\}\Z", r"\1\2/\3", text.replace("−", "-"))


def _split_at_commas(text: str) -> list[str]:
    """The parts between the commas that no bracket encloses."""
    elements, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return elements


FINAL_ANSWERS: dict[AnswerKind, Callable[[str], str | None]] = {
    "number": _final_number,
    "math": _final_math,
    "choice": _final_letter,
}
REFERENCES: dict[AnswerKind, Callable[[str], str | None]] = {
    "number": lambda text: _number(WHOLE_NUMBER.match(_plain_numbers(text).removesuffix("%"))),
    "math": _reference_math,
    "choice": _reference_letter,
}
