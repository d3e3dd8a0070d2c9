"""Unit, clock and calendar conversions with the rule that is used."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from specforge_core.demo.corpus.problem import Accepts, Problem, capitalized, draw, pick
from specforge_core.demo.corpus.steps import divide, minus, plus, times
from specforge_core.demo.corpus.words import MONTH_LENGTHS, MONTHS, NAMES, PACKED_GOODS, PLACES, WEEKDAYS

# (one larger unit, larger units, smaller units, how many smaller in one larger, largest count asked for)
UNITS = (
    ("kilometre", "kilometres", "metres", 1000, 99),
    ("metre", "metres", "centimetres", 100, 99),
    ("centimetre", "centimetres", "millimetres", 10, 990),
    ("foot", "feet", "inches", 12, 99),
    ("yard", "yards", "feet", 3, 300),
    ("kilogram", "kilograms", "grams", 1000, 99),
    ("tonne", "tonnes", "kilograms", 1000, 99),
    ("pound", "pounds", "ounces", 16, 60),
    ("litre", "litres", "millilitres", 1000, 99),
    ("litre", "litres", "centilitres", 100, 99),
    ("gallon", "gallons", "quarts", 4, 200),
    ("gallon", "gallons", "pints", 8, 120),
    ("hour", "hours", "minutes", 60, 60),
    ("minute", "minutes", "seconds", 60, 60),
    ("day", "days", "hours", 24, 40),
    ("week", "weeks", "days", 7, 120),
    ("year", "years", "months", 12, 60),
    ("dozen", "dozen", "pieces", 12, 80),
    ("dollar", "dollars", "cents", 100, 99),
)


class Worked(NamedTuple):
    """A conversion with its numbers filled in. `conclusion` is the last sentence without its stop."""

    question: str
    rule: str
    sums: tuple[str, ...]
    conclusion: str
    final_answer: str


class Kind(NamedTuple):
    """A kind of conversion: `facts` draws what is given, `work` words and solves it."""

    facts: Callable[[Random], tuple[int | str, ...]]
    work: Callable[..., Worked]


def _ask(rng: Random, given: str, wanted: str) -> str:
    return pick(
        rng,
        f"Convert {given} to {wanted}.",
        f"How many {wanted} are in {given}?",
        f"What is {given} in {wanted}?",
        f"Please express {given} in {wanted}.",
        f"{rng.choice(NAMES)} measured {given} in the {rng.choice(PLACES)}. Give that in {wanted}.",
        f"Write {given} as {wanted} and show the work.",
    )


def _down_facts(rng: Random) -> tuple[int, ...]:
    unit = rng.randrange(len(UNITS))
    return unit, rng.randint(2, UNITS[unit][4])


def _down(rng: Random, unit: int, count: int) -> Worked:
    one, many, small, factor, _ = UNITS[unit]
    total = count * factor
    rule = rng.choice((f"One {one} is {factor} {small}", f"There are {factor} {small} in one {one}"))
    return Worked(
        _ask(rng, f"{count} {many}", small), f"{rule}, so multiply by {factor}", (times(count, factor),),
        rng.choice((f"{count} {many} make {total} {small}", f"the result in {small} is {total}")), str(total),
    )  # fmt: skip


def digit_values(number: int) -> list[int]:
    """What the digits of a number stand for, zeros left out: 306 is 300 and 6."""
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - 1 - i) for i, digit in enumerate(digits) if digit != "0"]


def _up_facts(rng: Random) -> tuple[int, ...]:
    unit = rng.randrange(len(UNITS))
    factor, most = UNITS[unit][3:]
    return unit, rng.randint(2, most) * factor + rng.choice((0, rng.randrange(2, factor)))


def _up(rng: Random, unit: int, total: int) -> Worked:
    one, many, small, factor, _ = UNITS[unit]
    whole, rest = divmod(total, factor)
    rule = rng.choice((f"{factor} {small} make one {one}", f"It takes {factor} {small} for one {one}"))
    sums, left = [], total
    parts = [whole] if factor in (10, 100, 1000) else digit_values(whole)
    for part in parts:
        sums += [times(part, factor), minus(left, part * factor)]
        left -= part * factor
    if len(parts) > 1:
        sums.append(f"{' + '.join(map(str, parts))} = {whole}")
    result = f"{whole} {many} and {rest} {small}" if rest else f"{whole} {many}"
    return Worked(
        _ask(rng, f"{total} {small}", many), f"{rule}, so see how often {factor} goes into {total}", tuple(sums),
        rng.choice((f"{total} {small} make {result}", f"the result is {result}")), result,
    )  # fmt: skip


def _mixed_facts(rng: Random) -> tuple[int, ...]:
    unit = rng.randrange(len(UNITS))
    factor, most = UNITS[unit][3:]
    return unit, rng.randint(1, most), rng.randint(2, factor - 1)


def _mixed(rng: Random, unit: int, count: int, extra: int) -> Worked:
    one, many, small, factor, _ = UNITS[unit]
    head = f"1 {one}" if count == 1 else f"{count} {many}"
    total = count * factor + extra
    return Worked(
        _ask(rng, f"{head} and {extra} {small}", small), f"One {one} is {factor} {small}",
        (times(count, factor), plus(count * factor, extra)),
        rng.choice((f"{head} and {extra} {small} make {total} {small}", f"the total in {small} is {total}")),
        str(total),
    )  # fmt: skip


def _celsius_facts(rng: Random) -> tuple[int, ...]:
    return (rng.randint(-8, 60) * 5,)


def _celsius(rng: Random, degrees: int) -> Worked:
    fahrenheit = degrees * 9 // 5 + 32
    fifth = degrees // 5
    where = rng.choice(("", f" It was measured in the {rng.choice(PLACES)}.", f" {rng.choice(NAMES)} wants to know."))
    return Worked(
        rng.choice((f"What is {degrees} degrees Celsius in Fahrenheit?", f"Convert {degrees} C to F.",
                    f"A thermometer shows {degrees} degrees Celsius. How much is that in Fahrenheit?")) + where,
        "Divide by 5, multiply by 9 and add 32",
        (divide(degrees, 5), f"{fifth} × 9 = {fifth * 9}", plus(fifth * 9, 32)),
        rng.choice((f"the temperature in Fahrenheit is {fahrenheit}", f"{degrees} C is the same as {fahrenheit} F")),
        str(fahrenheit),
    )  # fmt: skip


def clock(minutes: int) -> str:
    """Minutes after midnight as 24-hour time, such as "9:05"."""
    return f"{minutes // 60 % 24}:{minutes % 60:02d}"


def _later_facts(rng: Random) -> tuple[int, ...]:
    return rng.randrange(24 * 60), rng.randint(1, 9), rng.randint(2, 59)


def _later(rng: Random, start: int, hours: int, minutes: int) -> Worked:
    after_hours = start + hours * 60
    end = after_hours + minutes
    event = rng.choice(
        ("film", "meeting", "flight", "concert", "class", "drive", "match", "shift", "party", "tour", "train ride")
    )
    hour_word = "hour" if hours == 1 else "hours"
    sums = [f"{clock(start)} plus {hours} {hour_word} is {clock(after_hours)}"]
    minute_sum = plus(after_hours % 60, minutes)
    if after_hours % 60 + minutes >= 60:
        minute_sum += f", and {minus(after_hours % 60 + minutes, 60)}"
    sums += [minute_sum, f"{clock(after_hours)} plus {minutes} minutes is {clock(end)}"]
    return Worked(
        rng.choice((f"A {event} starts at {clock(start)} and lasts {hours} {hour_word} and {minutes} minutes. "
                    f"When does it end?",
                    f"{rng.choice(NAMES)} begins a {event} at {clock(start)}. It takes {hours} {hour_word} and "
                    f"{minutes} minutes. What time is it afterwards?",
                    f"What time is it {hours} {hour_word} and {minutes} minutes after {clock(start)}?")),
        "Add the hours first, then the minutes", tuple(sums), f"the time is {clock(end)}", clock(end),
    )  # fmt: skip


def _half_day_facts(rng: Random) -> tuple[int | str, ...]:
    return rng.randrange(24 * 60), rng.choice(("to12", "to24"))


def _half_day(rng: Random, minutes: int, direction: str) -> Worked:
    hour, minute = divmod(minutes, 60)
    suffix = "am" if hour < 12 else "pm"
    twelve = f"{(hour - 1) % 12 + 1}:{minute:02d} {suffix}"
    day = clock(minutes)
    if hour == 0:
        rule = "The hour after midnight is 12 am on a 12-hour clock and 0 on a 24-hour clock"
    elif hour < 12:
        rule = "Morning hours are the same on both clocks"
    elif hour == 12:
        rule = "The hour after noon is 12 on both clocks"
    else:
        rule = "After noon the two clocks differ by 12 hours"
    sums = () if hour <= 12 else ((minus(hour, 12),) if direction == "to12" else (plus(hour - 12, 12),))
    if direction == "to12":
        question = rng.choice((f"Write {day} on a 12-hour clock.", f"What is {day} with am or pm?",
                               f"{rng.choice(NAMES)} sees {day} on the station clock. "
                               "Say it with am or pm."))  # fmt: skip
        return Worked(question, rule, sums, f"{day} is {twelve}", twelve)
    question = rng.choice((f"Write {twelve} as 24-hour time.", f"What is {twelve} on a 24-hour clock?",
                           f"The {rng.choice(PLACES)} opens at {twelve}. Give it in 24-hour time."))  # fmt: skip
    return Worked(question, rule, sums, f"{twelve} is {day}", day)


def _weekday_facts(rng: Random) -> tuple[int | str, ...]:
    return rng.randrange(7), rng.randint(3, 99), rng.choice(("after", "before"))


def _weekday(rng: Random, start: int, days: int, direction: str) -> Worked:
    weeks, rest = divmod(days, 7)
    sign = 1 if direction == "after" else -1
    end = WEEKDAYS[(start + sign * rest) % 7]
    path = [WEEKDAYS[(start + sign * i) % 7] for i in range(1, rest + 1)]
    sums = [f"{weeks} × 7 = {weeks * 7}, and {minus(days, weeks * 7)}"] if weeks else []
    if rest:
        sums.append(f"count {rest} from {WEEKDAYS[start]}: {', '.join(path)}")
    today, task = (
        WEEKDAYS[start],
        rng.choice(("the exam", "the trip", "the concert", "the visit", "the sale", "the deadline")),
    )
    when = (
        rng.choice((f"{capitalized(task)} is in {days} days.", f"{rng.choice(NAMES)} has {task} {days} days from now."))
        if sign > 0
        else f"{capitalized(task)} was {days} days ago."
    )
    question = pick(
        rng,
        f"Today is {today}. {when} Which weekday is that?",
        f"What day of the week is {days} days {direction} {today}?",
        f"Which weekday comes {days} days {direction} a {today}?",
    )
    return Worked(
        question, "Whole weeks change nothing, so only the days left over count", tuple(sums), f"the day is {end}", end
    )


def _date_facts(rng: Random) -> tuple[int, ...]:
    month = rng.randrange(12)
    return month, rng.randint(1, MONTH_LENGTHS[month]), rng.randint(2, 40)


def _date(rng: Random, month: int, day: int, days: int) -> Worked:
    sums, here, at = [plus(day, days)], month, day + days
    while at > MONTH_LENGTHS[here]:
        rest = minus(at, MONTH_LENGTHS[here])
        sums.append(f"{MONTHS[here]} has {MONTH_LENGTHS[here]} days, and {rest} for {MONTHS[(here + 1) % 12]}")
        here, at = (here + 1) % 12, at - MONTH_LENGTHS[here]
    sums.append(f"{MONTHS[here]} has {MONTH_LENGTHS[here]} days, enough for {at}")
    end = f"{MONTHS[here]} {at}"
    thing = rng.choice(("parcel", "ticket", "permit", "book", "coupon", "visa", "bill", "loan"))
    question = pick(
        rng,
        f"What date is {days} days after {MONTHS[month]} {day}? It is not a leap year.",
        f"A {thing} from {MONTHS[month]} {day} is due in {days} days. Which date is that, in a year with 365 days?",
        f"In a year that is no leap year, {rng.choice(NAMES)} starts on {MONTHS[month]} {day} and finishes {days} "
        f"days later. On which date?",
    )
    return Worked(
        question, "Add the days and take off every month that is full", tuple(sums), f"the date is {end}", end
    )


def _iso_facts(rng: Random) -> tuple[int | str, ...]:
    month = rng.randrange(12)
    return rng.randint(1950, 2049), month, rng.randint(1, MONTH_LENGTHS[month]), rng.choice(("to words", "to digits"))


def _iso(rng: Random, year: int, month: int, day: int, direction: str) -> Worked:
    digits, words = f"{year}-{month + 1:02d}-{day:02d}", f"{MONTHS[month]} {day}, {year}"
    if direction == "to words":
        rule = f"The parts are the year {year}, the month {month + 1:02d} and the day {day:02d}"
        question = rng.choice((f"Write the date {digits} in words.", f"Which date is {digits}?",
                               f"A form says {digits}. Write the date with the month's name."))  # fmt: skip
        return Worked(question, rule, (f"month {month + 1:02d} is {MONTHS[month]}",), f"the date is {words}", words)
    rule = "The order is year, month, day, with two digits for month and day"
    question = rng.choice((f"Write {words} as an ISO date.", f"Give {words} in the form YYYY-MM-DD.",
                           f"{rng.choice(NAMES)} was born on {words}. Write that as year-month-day."))  # fmt: skip
    return Worked(question, rule, (f"{MONTHS[month]} is month {month + 1:02d}",), f"the date is {digits}", digits)


ROMAN = ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))


def _roman_facts(rng: Random) -> tuple[int | str, ...]:
    return rng.randint(4, 399), rng.choice(("to", "from"))


def _roman(rng: Random, number: int, direction: str) -> Worked:
    parts, left = [], number
    for value, symbol in ROMAN:
        while left >= value:
            parts.append((value, symbol))
            left -= value
    roman = "".join(symbol for _, symbol in parts)
    what = rng.choice(("chapter", "page", "room", "volume", "house", "locker"))
    if direction == "to":
        question = rng.choice(
            (f"Write {number} in Roman numerals.", f"How is {what} {number} written in Roman numerals?")
        )
        sums = (
            " + ".join(str(value) for value, _ in parts) + f" = {number}",
            ", ".join(f"{v} is {s}" for v, s in parts),
        )
        return Worked(question, "Split the number into Roman values", sums, f"the numeral is {roman}", roman)
    question = rng.choice((f"Which number is {roman}?", f"The {what} is marked {roman}. What number is that?"))
    sums = (", ".join(f"{s} is {v}" for v, s in parts), " + ".join(str(value) for value, _ in parts) + f" = {number}")
    return Worked(question, "Read the Roman values from left to right", sums, f"the number is {number}", str(number))


def _price_facts(rng: Random) -> tuple[int, ...]:
    return rng.randint(2, 24), rng.randint(2, 24), rng.randint(2, 40)


def _price(rng: Random, group: int, cost: int, groups: int) -> Worked:
    goods, one, many = rng.choice(PACKED_GOODS)
    want, total = group * groups, cost * groups
    return Worked(
        rng.choice((f"If {group} {goods} cost ${cost}, what do {want} {goods} cost?",
                    f"A {one} of {group} {goods} is ${cost}. What is the price of {want} {goods} in such {many}?")),
        f"See how many groups of {group} are in {want}, then multiply by the price",
        (divide(want, group), times(groups, cost)), f"{want} {goods} cost ${total}", str(total),
    )  # fmt: skip


KINDS: dict[str, Kind] = {
    "down": Kind(_down_facts, _down),
    "up": Kind(_up_facts, _up),
    "mixed": Kind(_mixed_facts, _mixed),
    "celsius": Kind(_celsius_facts, _celsius),
    "later": Kind(_later_facts, _later),
    "half day": Kind(_half_day_facts, _half_day),
    "weekday": Kind(_weekday_facts, _weekday),
    "date": Kind(_date_facts, _date),
    "iso": Kind(_iso_facts, _iso),
    "roman": Kind(_roman_facts, _roman),
    "price": Kind(_price_facts, _price),
}


def _told(rng: Random, worked: Worked) -> str:
    style = rng.randrange(3)
    if style == 0:
        return "\n".join(
            (f"{worked.rule}.", *(f"{capitalized(line)}." for line in worked.sums), f"So {worked.conclusion}.")
        )
    if style == 1:
        lines = (worked.rule, *worked.sums, worked.conclusion)
        return "\n".join(f"{i}. {capitalized(line)}." for i, line in enumerate(lines, 1))
    sums = " ".join(f"{capitalized(line)}." for line in worked.sums)
    return f"{worked.rule}. {sums} Therefore {worked.conclusion}.".replace("  ", " ")


def key_of(kind: str, facts: tuple[int | str, ...]) -> str:
    """The key of a conversion: its kind and what is given."""
    return f"convert|{kind}|{facts}"


def sample(rng: Random, accepts: Accepts) -> Problem:
    """A conversion of a random kind."""
    kind = rng.choice(tuple(KINDS))
    facts = draw(lambda: KINDS[kind].facts(rng), lambda drawn: key_of(kind, drawn), accepts)
    worked = KINDS[kind].work(rng, *facts)
    return Problem(key_of(kind, facts), worked.question, _told(rng, worked), worked.final_answer)
