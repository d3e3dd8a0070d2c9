"""Questions about small tables, written as Markdown, CSV or plain lines."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from specforge_core.demo.corpus.problem import Accepts, Problem, capitalized, draw, listed
from specforge_core.demo.corpus.steps import minus
from specforge_core.demo.corpus.words import ADJECTIVES, CITIES, JOBS, NAMES, PACKED_GOODS, PLACES, SHOP_GOODS, VEHICLES

GOODS = tuple(goods for goods, _, _ in PACKED_GOODS)
PIECES = tuple(one for one, _ in SHOP_GOODS)


class Column(NamedTuple):
    """A column: its header, and either words to pick from or the range of its numbers."""

    header: str
    words: tuple[str, ...] = ()
    low: int = 0
    high: int = 0


class Theme(NamedTuple):
    """A kind of table: what a row is called, the column that names it, and the columns to choose from."""

    row: str
    named_by: Column
    labels: tuple[Column, ...]
    figures: tuple[Column, ...]


THEMES = (
    Theme(
        "person", Column("name", tuple(NAMES)),
        (Column("city", tuple(CITIES)), Column("job", tuple(JOBS)), Column("team", ("red", "blue", "green", "gold"))),
        (Column("age", low=18, high=79), Column("score", low=10, high=99), Column("bonus", low=5, high=250)),
    ),
    Theme(
        "product", Column("product", PIECES),
        (Column("colour", ("red", "blue", "green", "white", "black", "grey")), Column("shelf", ("A", "B", "C", "D"))),
        (Column("price", low=2, high=95), Column("stock", low=3, high=400), Column("discount", low=2, high=99)),
    ),
    Theme(
        "trip", Column("city", tuple(CITIES)),
        (Column("vehicle", VEHICLES), Column("guide", tuple(NAMES))),
        (Column("duration", low=2, high=21), Column("cost", low=40, high=990), Column("capacity", low=3, high=60)),
    ),
    Theme(
        "item", Column("item", GOODS),
        (Column("place", tuple(PLACES)), Column("quality", tuple(ADJECTIVES))),
        (Column("quantity", low=4, high=300), Column("weight", low=2, high=90), Column("demand", low=2, high=80)),
    ),
)  # fmt: skip


class Table(NamedTuple):
    """A small table. Rows hold cells as text; column 0 names the row, column 1 is a label, the rest are figures."""

    row: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def figures(self, column: int) -> list[int]:
        return [int(row[column]) for row in self.rows]

    def names(self) -> list[str]:
        return [row[0] for row in self.rows]


class Reply(NamedTuple):
    """A question about a table, the sentences that work towards the answer, and the last one without its stop."""

    question: str
    work: tuple[str, ...]
    conclusion: str
    final_answer: str | None


def random_table(rng: Random) -> Table:
    """A table of three to five rows with one label and one or two columns of figures, no figure twice in a column."""
    theme, num_rows = rng.choice(THEMES), rng.randint(3, 5)
    label, figures = rng.choice(theme.labels), rng.sample(theme.figures, rng.randint(1, 2))
    # Few distinct labels, so that questions about groups have something to find.
    pool = rng.sample(label.words, min(len(label.words), rng.randint(2, 3)))
    columns = [rng.sample(theme.named_by.words, num_rows), [rng.choice(pool) for _ in range(num_rows)]]
    columns += [[str(n) for n in rng.sample(range(column.low, column.high + 1), num_rows)] for column in figures]
    headers = (theme.named_by.header, label.header, *(column.header for column in figures))
    return Table(theme.row, headers, tuple(zip(*columns, strict=True)))


def shown(rng: Random, table: Table) -> str:
    """The table as text, in one of three layouts."""
    layout = rng.randrange(3)
    if layout == 0:
        lines = [table.headers, ("---",) * len(table.headers), *table.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if layout == 1:
        return "\n".join(",".join(line) for line in (table.headers, *table.rows))
    return "\n".join(
        f"{row[0]}: " + ", ".join(f"{header} {cell}" for header, cell in zip(table.headers[1:], row[1:], strict=True))
        for row in table.rows
    )


def _read_out(table: Table, column: int) -> str:
    """A column cell by cell, the same for every layout of the table."""
    cells = [f"{row[0]} with {row[column]}" for row in table.rows]
    return f"the {table.headers[column]} column shows {listed(cells)}"


def _searched(table: Table, names: tuple[str, ...], column: int) -> str:
    """The rows from the top until all names are found, each with a verdict and the wanted ones with their cells.

    A model this small learns to compare one name after the other, but not to jump to a row by its name.
    """
    last = max(table.names().index(name) for name in names)
    verdicts = [f"{row[0]} yes with {row[column]}" if row[0] in names else f"{row[0]} no" for row in table.rows]
    return f"row by row: {', '.join(verdicts[: last + 1])}"


def _look_up(rng: Random, table: Table) -> Reply:
    row, column = rng.choice(table.rows), rng.randrange(1, len(table.headers))
    header = table.headers[column]
    question = rng.choice((f"What is the {header} of {row[0]}?", f"Find the {header} for {row[0]}.",
                           f"Which {header} belongs to {row[0]}?"))  # fmt: skip
    work = (_searched(table, (row[0],), column),)
    return Reply(question, work, f"the {header} of {row[0]} is {row[column]}", row[column])


def _extreme(rng: Random, table: Table) -> Reply:
    column, pick = rng.randrange(2, len(table.headers)), rng.choice((max, min))
    header, value = table.headers[column], pick(table.figures(column))
    name = table.rows[table.figures(column).index(value)][0]
    word = rng.choice(("highest", "largest")) if pick is max else rng.choice(("lowest", "smallest"))
    question = rng.choice((f"Which {table.row} has the {word} {header}?",
                           f"Find the {table.row} with the {word} {header}.",
                           f"Where is the {header} {word}?"))  # fmt: skip
    work = (_read_out(table, column), f"the {word} of these is {value}")
    return Reply(question, work, f"the {word} {header} belongs to {name}", name)


def _total(rng: Random, table: Table) -> Reply:
    column = rng.randrange(2, len(table.headers))
    header, figures = table.headers[column], table.figures(column)
    question = rng.choice(
        (f"What is the total {header}?", f"Add up the {header} column.", f"What is the sum of the {header} figures?")
    )
    sums, running = [], figures[0]
    for figure in figures[1:]:
        sums.append(f"{running} + {figure} = {running + figure}")
        running += figure
    work = (f"the {header} figures are {listed([str(n) for n in figures])}", *sums)
    return Reply(question, work, f"the total {header} is {running}", str(running))


def _difference(rng: Random, table: Table) -> Reply:
    column = rng.randrange(2, len(table.headers))
    header = table.headers[column]
    one, other = rng.sample(table.rows, 2)
    a, b = sorted((int(one[column]), int(other[column])), reverse=True)
    question = rng.choice((f"How far apart are {one[0]} and {other[0]} in {header}?",
                           f"What is the difference in {header} between {one[0]} and {other[0]}?"))  # fmt: skip
    work = (_searched(table, (one[0], other[0]), column), minus(a, b))
    return Reply(question, work, f"the difference in {header} is {a - b}", str(a - b))


def _count_above(rng: Random, table: Table) -> Reply:
    column = rng.randrange(2, len(table.headers))
    header, figures = table.headers[column], table.figures(column)
    limit = rng.choice(figures) + rng.choice((-1, 0, 1))
    question = rng.choice(
        (f"How many rows have {header} above {limit}?", f"Count the rows whose {header} is more than {limit}.")
    )
    checks = tuple(
        f"{n} for {row[0]} is {'more than' if n > limit else 'not more than'} {limit}"
        for row, n in zip(table.rows, figures, strict=True)
    )
    count = sum(n > limit for n in figures)
    return Reply(question, checks, f"the count is {count}", str(count))


def _group(rng: Random, table: Table) -> Reply:
    value, header = rng.choice(table.rows)[1], table.headers[1]
    names = [row[0] for row in table.rows if row[1] == value]
    question = rng.choice(
        (f"Which rows have {value} as {header}?", f"List every {table.row} whose {header} is {value}.")
    )
    # Each name follows its verdict at once, so that the list at the end only collects what was kept.
    checks = [f"{row[1]} {'keeps' if row[1] == value else 'rules out'} {row[0]}" for row in table.rows]
    conclusion = f"the match is {names[0]}" if len(names) == 1 else f"the matches are {listed(names)}"
    return Reply(question, (f"by {header}, {listed(checks)}",), conclusion, listed(names))


def _order(rng: Random, table: Table) -> Reply:
    column, falling = rng.randrange(2, len(table.headers)), rng.random() < 0.5
    header = table.headers[column]
    direction = "from high to low" if falling else "from low to high"
    ranked = sorted(table.rows, key=lambda row: int(row[column]), reverse=falling)
    question = rng.choice((f"Sort the rows by {header} {direction}.", f"Put them in order of {header}, {direction}."))
    work = (f"the figures {direction} are {listed([row[column] for row in ranked])}",)
    names = listed([row[0] for row in ranked])
    return Reply(question, work, f"the order is {names}", names)


def _summary(rng: Random, table: Table) -> Reply:
    column = rng.randrange(2, len(table.headers))
    header, figures = table.headers[column], table.figures(column)
    best, worst = table.names()[figures.index(max(figures))], table.names()[figures.index(min(figures))]
    question = rng.choice((f"Summarise the table in a few sentences, with a look at {header}.",
                           f"Describe what the table says about {header}.",
                           f"Write a short summary about {header}."))  # fmt: skip
    groups = listed(
        [f"{sum(row[1] == v for row in table.rows)} with {v}" for v in dict.fromkeys(row[1] for row in table.rows)]
    )
    work = (
        f"the table has {len(table.rows)} rows: {listed(table.names())}",
        f"by {table.headers[1]} there are {groups}",
        f"the {header} goes from {min(figures)} to {max(figures)}",
    )
    conclusion = f"the most is with {best} and the least with {worst}"
    return Reply(question, work, conclusion, f"most is with {best} and the least with {worst}")


QUESTIONS: tuple[Callable[[Random, Table], Reply], ...] = (
    _look_up, _extreme, _total, _difference, _count_above, _group, _order, _summary,
)  # fmt: skip
# What compares names is asked more often, because it is the hardest to learn.
WEIGHTED_QUESTIONS = (*QUESTIONS, _look_up, _difference, _group)


def told(rng: Random, reply: Reply) -> str:
    """The reply as text, as a paragraph, as lines or with the result set apart."""
    work = [f"{capitalized(line)}." for line in reply.work]
    style = rng.randrange(3)
    if style == 0:
        return " ".join((*work, f"So {reply.conclusion}."))
    if style == 1:
        return "\n".join((*(f"- {line}" for line in work), f"{capitalized(reply.conclusion)}."))
    return " ".join(work) + f"\n\nAnswer: {reply.conclusion}."


def introduced(rng: Random, table: Table, question: str) -> str:
    """The table and a question about it as one prompt."""
    text = shown(rng, table)
    intro = rng.choice(("Here is a table.", "Look at this table:", f"{rng.choice(NAMES)} made this list:",
                        "Use the data below.", f"This comes from the {rng.choice(PLACES)}.",
                        f"Each line is one {table.row}."))  # fmt: skip
    return f"{intro}\n\n{text}\n\n{question}" if rng.random() < 0.7 else f"{question}\n\n{text}"


def key_of(table: Table) -> str:
    """The key of a table: all its cells, whatever is asked and however it is laid out."""
    return f"table|{table.headers}|{table.rows}"


def sample(rng: Random, accepts: Accepts) -> Problem:
    """A question about a random table."""
    table = draw(lambda: random_table(rng), key_of, accepts)
    reply = rng.choice(WEIGHTED_QUESTIONS)(rng, table)
    return Problem(key_of(table), introduced(rng, table, reply.question), told(rng, reply), reply.final_answer)
