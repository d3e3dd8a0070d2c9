"""Arithmetic word problems, worked out one operation a line."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from specforge_core.demo.corpus.problem import Accepts, Problem, draw, pick
from specforge_core.demo.corpus.steps import Step, divide, minus, plus, times, written_out
from specforge_core.demo.corpus.words import (
    COUNTED_SPOTS,
    DISHES,
    INGREDIENTS,
    NAMES,
    PACKED_GOODS,
    PLACES,
    SHOP_GOODS,
    VEHICLES,
)

Numbers = tuple[int, ...]


class Story(NamedTuple):
    """A problem with its numbers filled in. `changed` words the first number as a condition: "there were 7 crates"."""

    question: str
    steps: tuple[Step, ...]
    conclusion: str
    result: int
    changed: str


class Kind(NamedTuple):
    """A kind of problem. `numbers` draws figures that work out evenly; `tell` words them, equal for equal rng."""

    numbers: Callable[[Random], Numbers]
    tell: Callable[[Random, Numbers], Story]


def _packed_numbers(rng: Random) -> Numbers:
    count, each = rng.randint(3, 24), rng.randint(4, 48)
    return count, each, rng.randint(2, count * each - 1)


def _packed(rng: Random, numbers: Numbers) -> Story:
    count, each, gone = numbers
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    goods, one, many = rng.choice(PACKED_GOODS)
    lost = rng.choice(("sells", "gives away", "uses", "throws away", "sends back", "sets aside"))
    question = pick(
        rng,
        f"{name} has {count} {many} with {each} {goods} in each {one}. {name} {lost} {gone} {goods}. "
        f"How many {goods} are left?",
        f"A {place} receives {count} {many} of {goods}, and every {one} holds {each}. The {place} {lost} {gone} of "
        f"them. How many {goods} does it still have?",
        f"There are {each} {goods} in a {one}. {name} takes {count} {many} and {lost} {gone} {goods}. How many "
        f"{goods} remain?",
        f"{name} counts {count} {many} in the {place}, each with {each} {goods}. Later {name} {lost} {gone}. Find "
        f"the number of {goods} that remain.",
    )
    total = count * each
    steps = (
        Step(f"count the {goods} in {count} {many}", times(count, each)),
        Step(f"take away the {gone} that are gone", minus(total, gone)),
    )
    conclusion = rng.choice((f"the number of {goods} left is {total - gone}", f"what remains is {total - gone}"))
    return Story(question, steps, conclusion, total - gone, f"there were {count} {many}")


def _shopping_numbers(rng: Random) -> Numbers:
    first, second = rng.randint(2, 9), rng.randint(2, 9)
    price, other = rng.randint(2, 39), rng.randint(2, 39)
    total = first * price + second * other
    return first, price, second, other, (total // 10 + rng.randint(1, 6)) * 10


def _shopping(rng: Random, numbers: Numbers) -> Story:
    first, price, second, other, paid = numbers
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    (one, many), (one_more, many_more) = rng.sample(SHOP_GOODS, 2)
    question = pick(
        rng,
        f"{name} buys {first} {many} at ${price} each and {second} {many_more} at ${other} each, and pays with "
        f"${paid}. How much change does {name} get?",
        f"At the {place} a {one} costs ${price} and a {one_more} costs ${other}. {name} takes {first} {many} and "
        f"{second} {many_more} and has ${paid}. How much money is left?",
        f"{name} has ${paid} and orders {first} {many} for ${price} each, then {second} {many_more} for ${other} "
        f"each. What is left of the money?",
    )
    a, b = first * price, second * other
    steps = (
        Step(f"find the price of the {many}", times(first, price)),
        Step(f"find the price of the {many_more}", times(second, other)),
        Step("add both prices", plus(a, b)),
        Step(f"subtract the total from ${paid}", minus(paid, a + b)),
    )
    conclusion = rng.choice((f"{name} keeps ${paid - a - b}", f"the money left is ${paid - a - b}"))
    return Story(question, steps, conclusion, paid - a - b, f"{name} took {first} {many}")


def _sharing_numbers(rng: Random) -> Numbers:
    people, each = rng.randint(2, 12), rng.randint(4, 60)
    total = people * each
    return rng.randint(2, total - 2), total, people


def _sharing(rng: Random, numbers: Numbers) -> Story:
    first, total, people = numbers
    second = total - first
    name, friend = rng.sample(NAMES, 2)
    goods = rng.choice(PACKED_GOODS)[0]
    group = rng.choice(("friends", "children", "neighbours", "classes", "teams", "guests", "pupils"))
    question = pick(
        rng,
        f"{name} has {first} {goods} and {friend} has {second}. They put them together and share them equally "
        f"among {people} {group}. How many does each get?",
        f"{name} collects {first} {goods} in the morning and {second} in the afternoon. {people} {group} split "
        f"them evenly. How many {goods} go to each?",
        f"{people} {group} share {goods} in equal parts: {first} from {name} and {second} from {friend}. What is "
        f"the share of each?",
    )
    steps = (
        Step(f"add up the {goods}", plus(first, second)),
        Step(f"share them among the {people} {group}", divide(total, people)),
    )
    conclusion = rng.choice(
        (f"each share is {total // people}", f"each of the {people} {group} gets {total // people}")
    )
    return Story(question, steps, conclusion, total // people, f"{name} gave {first} {goods}")


def _travel_numbers(rng: Random) -> Numbers:
    return rng.randint(2, 9), rng.randint(12, 98), rng.randint(2, 9), rng.randint(12, 98)


def _travel(rng: Random, numbers: Numbers) -> Story:
    hours, speed, more_hours, more_speed = numbers
    vehicle, name = rng.choice(VEHICLES), rng.choice(NAMES)
    question = pick(
        rng,
        f"A {vehicle} travels for {hours} hours at {speed} km per hour and then for {more_hours} hours at "
        f"{more_speed} km per hour. How far does it go in all?",
        f"{name} takes a {vehicle} for {hours} hours at a speed of {speed} km per hour. After a break it goes on "
        f"at {more_speed} km per hour for {more_hours} hours. What is the whole distance?",
    )
    a, b = hours * speed, more_hours * more_speed
    steps = (
        Step("find the first distance", times(hours, speed)),
        Step("find the second distance", times(more_hours, more_speed)),
        Step("add both distances", plus(a, b)),
    )
    conclusion = rng.choice((f"the distance in km is {a + b}", f"the {vehicle} goes {a + b} km"))
    return Story(question, steps, conclusion, a + b, f"the first part took {hours} hours")


def _saving_numbers(rng: Random) -> Numbers:
    weeks, weekly, start = rng.randint(3, 30), rng.randint(3, 40), rng.randint(5, 400)
    return weeks, weekly, start, rng.randint(2, start + weeks * weekly - 1)


def _saving(rng: Random, numbers: Numbers) -> Story:
    weeks, weekly, start, price = numbers
    name, thing = rng.choice(NAMES), rng.choice(SHOP_GOODS)[0]
    period = rng.choice(("week", "month", "day"))
    question = pick(
        rng,
        f"{name} starts with ${start} and saves ${weekly} every {period}. After {weeks} {period}s {name} buys a "
        f"{thing} for ${price}. How much money does {name} have then?",
        f"There are ${start} in a savings box. {name} adds ${weekly} a {period} for {weeks} {period}s and then "
        f"spends ${price} on a {thing}. What is left in the box?",
    )
    saved = weeks * weekly
    steps = (
        Step(f"find what {name} saves in {weeks} {period}s", times(weeks, weekly)),
        Step(f"add the ${start} from the start", plus(start, saved)),
        Step(f"subtract the price of the {thing}", minus(start + saved, price)),
    )
    conclusion = rng.choice((f"{name} has ${start + saved - price}", f"the amount left is ${start + saved - price}"))
    return Story(question, steps, conclusion, start + saved - price, f"{name} saved for {weeks} {period}s")


def _reading_numbers(rng: Random) -> Numbers:
    days, pages = rng.randint(3, 20), rng.randint(6, 45)
    return days, pages, days * pages + rng.randint(5, 300)


def _reading(rng: Random, numbers: Numbers) -> Story:
    days, pages, total = numbers
    name = rng.choice(NAMES)
    book = rng.choice(("novel", "book", "diary", "guide", "report", "biography", "mystery", "travel book"))
    verb, done = rng.choice(
        (("reads", "read"), ("edits", "edited"), ("translates", "translated"), ("copies", "copied"))
    )
    question = pick(
        rng,
        f"{name} {verb} {pages} pages of a {book} a day. The {book} has {total} pages. How many pages are left "
        f"after {days} days?",
        f"A {book} has {total} pages, and {name} {verb} {pages} of them every day. After {days} days, how many "
        f"pages remain?",
    )
    steps = (
        Step(f"find the pages {done} in {days} days", times(days, pages)),
        Step(f"subtract them from {total}", minus(total, days * pages)),
    )
    left = total - days * pages
    conclusion = rng.choice((f"the number of pages left is {left}", f"{name} still has to do {left}"))
    return Story(question, steps, conclusion, left, f"{name} had {days} days")


def _recipe_numbers(rng: Random) -> Numbers:
    return rng.randint(3, 24), rng.randint(2, 8), rng.randint(5, 45)


def _recipe(rng: Random, numbers: Numbers) -> Story:
    guests, servings, per_person = numbers
    name, ingredient, dish = rng.choice(NAMES), rng.choice(INGREDIENTS), rng.choice(DISHES)
    amount = servings * per_person
    question = pick(
        rng,
        f"A recipe for {dish} needs {amount} grams of {ingredient} for {servings} people. How many grams does "
        f"{name} need for {guests} people?",
        f"{name} makes {dish}. For {servings} people it takes {amount} grams of {ingredient}. How much "
        f"{ingredient} is needed for {guests} people?",
    )
    steps = (
        Step(f"find the {ingredient} for one person", divide(amount, servings)),
        Step(f"multiply by {guests} people", times(guests, per_person)),
    )
    conclusion = rng.choice(
        (f"the amount in grams is {guests * per_person}", f"{name} needs {guests * per_person} grams")
    )
    return Story(question, steps, conclusion, guests * per_person, f"there were {guests} people")


def _discount_numbers(rng: Random) -> Numbers:
    return rng.randint(2, 60) * 20, rng.choice((5, 10, 15, 20, 25, 30, 40, 50))


def _discount(rng: Random, numbers: Numbers) -> Story:
    price, percent = numbers
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    thing = rng.choice(
        ("bicycle", "sofa", "camera", "tent", "desk", "carpet", "guitar", "jacket", "phone", "lamp", "oven")
    )
    question = pick(
        rng,
        f"A {thing} costs ${price}. {name} gets {percent}% off. What does {name} pay?",
        f"The {place} takes {percent}% off the price of a {thing}. It was ${price} before. What is the new price?",
        f"{name} wants a {thing} for ${price} and has a coupon for {percent}% off. How much is it with the coupon?",
    )
    cut = price * percent // 100
    if percent % 10 == 0:
        parts = (
            Step(f"find 10% of ${price}", divide(price, 10)),
            Step(f"find {percent}%", times(percent // 10, price // 10)),
        )
    else:
        parts = (
            Step(f"find 5% of ${price}", divide(price, 20)),
            Step(f"find {percent}%", times(percent // 5, price // 20)),
        )
    steps = (*parts, Step("take the discount off", minus(price, cut)))
    conclusion = rng.choice((f"the new price is ${price - cut}", f"{name} pays ${price - cut}"))
    return Story(question, steps, conclusion, price - cut, f"the price were ${price}")


def _compare_numbers(rng: Random) -> Numbers:
    return rng.randint(4, 240), rng.randint(2, 9), rng.randint(0, 1)


def _compare(rng: Random, numbers: Numbers) -> Story:
    base, factor, want_total = numbers
    name, friend = rng.sample(NAMES, 2)
    goods = rng.choice(PACKED_GOODS)[0]
    multiple = "twice" if factor == 2 else f"{factor} times"
    if want_total:
        result, ask = base + base * factor, f"How many {goods} do they have together?"
        finish, conclusion = Step("add both amounts", plus(base, base * factor)), f"together it is {result}"
    else:
        result, ask = base * factor - base, f"How many more {goods} does {friend} have than {name}?"
        finish, conclusion = Step("find the difference", minus(base * factor, base)), f"the difference is {result}"
    verb = rng.choice(("has", "owns", "finds", "collects", "counts", "sells"))
    question = f"{name} {verb} {base} {goods}, and {friend} {verb} {multiple} as many. {ask}"
    steps = (Step(f"find how many {goods} {friend} {verb}", times(base, factor)), finish)
    return Story(question, steps, conclusion, result, f"{name} had {base} {goods}")


def _stock_numbers(rng: Random) -> Numbers:
    start, sold = rng.randint(60, 900), rng.randint(10, 59)
    more = rng.randint(20, 700)
    return start, sold, more, rng.randint(5, start - sold + more - 1)


def _stock(rng: Random, numbers: Numbers) -> Story:
    start, sold, more, sold_later = numbers
    place, goods, name = rng.choice(PLACES), rng.choice(PACKED_GOODS)[0], rng.choice(NAMES)
    first, second, third = pick(
        rng,
        ("On Monday", "On Tuesday", "On Wednesday"),
        ("In spring", "In summer", "In autumn"),
        ("First", "Then", "Later"),
    )
    question = pick(
        rng,
        f"A {place} has {start} {goods}. {first} {sold} are sold. {second} {more} new ones arrive. {third} "
        f"{sold_later} are sold. How many {goods} are there now?",
        f"{name} keeps {start} {goods} in the {place}. {first} {name} gives away {sold}, {second.lower()} {more} "
        f"come in, and {third.lower()} {sold_later} go out. How many are left?",
    )
    a = start - sold
    steps = (
        Step(f"subtract the first {sold}", minus(start, sold)),
        Step(f"add the {more} that came in", plus(a, more)),
        Step(f"subtract the other {sold_later}", minus(a + more, sold_later)),
    )
    left = a + more - sold_later
    conclusion = rng.choice((f"the number of {goods} is now {left}", f"the {place} holds {left}"))
    return Story(question, steps, conclusion, left, f"there were {start} {goods} at the start")


def _rows_numbers(rng: Random) -> Numbers:
    rows, per_row = rng.randint(5, 40), rng.randint(6, 40)
    return rows, per_row, rng.randint(5, rows * per_row - 1)


def _rows(rng: Random, numbers: Numbers) -> Story:
    rows, per_row, taken = numbers
    spot, seats = rng.choice(COUNTED_SPOTS)
    question = pick(
        rng,
        f"A {spot} has {rows} rows of {per_row} {seats}. If {taken} {seats} are taken, how many are free?",
        f"In a {spot} there are {rows} rows with {per_row} {seats} in each, and {taken} are in use. How many "
        f"{seats} are free?",
    )
    free = rows * per_row - taken
    steps = (
        Step(f"count all the {seats}", times(rows, per_row)),
        Step(f"subtract the {taken} that are taken", minus(rows * per_row, taken)),
    )
    return Story(question, steps, f"the number of free {seats} is {free}", free, f"there were {rows} rows")


def _wage_numbers(rng: Random) -> Numbers:
    return rng.randint(2, 9), rng.randint(2, 9), rng.randint(9, 36), rng.randint(5, 95)


def _wage(rng: Random, numbers: Numbers) -> Story:
    hours, days, rate, bonus = numbers
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    question = pick(
        rng,
        f"{name} works {hours} hours a day for {days} days in a {place} and earns ${rate} an hour, plus a bonus of "
        f"${bonus}. How much does {name} earn?",
        f"The {place} pays ${rate} an hour. {name} works there on {days} days for {hours} hours each and gets "
        f"${bonus} extra. What is the whole pay?",
    )
    total = hours * days
    steps = (
        Step("find the hours worked", times(hours, days)),
        Step(f"multiply by ${rate} an hour", times(total, rate)),
        Step(f"add the extra ${bonus}", plus(total * rate, bonus)),
    )
    pay = total * rate + bonus
    conclusion = rng.choice((f"{name} earns ${pay}", f"the pay is ${pay}"))
    return Story(question, steps, conclusion, pay, f"{name} worked {hours} hours a day")


KINDS: dict[str, Kind] = {
    "packed": Kind(_packed_numbers, _packed),
    "shopping": Kind(_shopping_numbers, _shopping),
    "sharing": Kind(_sharing_numbers, _sharing),
    "travel": Kind(_travel_numbers, _travel),
    "saving": Kind(_saving_numbers, _saving),
    "reading": Kind(_reading_numbers, _reading),
    "recipe": Kind(_recipe_numbers, _recipe),
    "discount": Kind(_discount_numbers, _discount),
    "compare": Kind(_compare_numbers, _compare),
    "stock": Kind(_stock_numbers, _stock),
    "rows": Kind(_rows_numbers, _rows),
    "wage": Kind(_wage_numbers, _wage),
}


def key_of(kind: str, numbers: Numbers) -> str:
    """The key of a problem: its kind and its numbers, whatever they count."""
    return f"arithmetic|{kind}|{numbers}"


def sample(rng: Random, accepts: Accepts) -> Problem:
    """A word problem of a random kind."""
    kind = rng.choice(tuple(KINDS))
    numbers = draw(lambda: KINDS[kind].numbers(rng), lambda drawn: key_of(kind, drawn), accepts)
    story = KINDS[kind].tell(rng, numbers)
    wish, answer = written_out(rng, story.steps, story.conclusion)
    return Problem(key_of(kind, numbers), story.question + wish, answer, str(story.result))
