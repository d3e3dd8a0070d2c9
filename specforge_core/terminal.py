"""What commands print: lines and tables, as wide as the terminal; into a file, as wide as a log. Torch-free."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 160
SHORT_CELL = 8
"""Characters of a cell that stays on one line, as `34 min`; longer ones are wrapped between words."""

Row = Mapping[str, str]


def terminal() -> Console:
    """Standard output."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def print_line(line: str) -> None:
    """Print a line as it is."""
    terminal().print(line, soft_wrap=True, markup=False, highlight=False)


def print_error(line: str) -> None:
    """Print a line to standard error."""
    Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)


def print_table(rows: Iterable[Row], *, title: str | None = None) -> None:
    """Print a table whose columns are the first row's; where the terminal is too narrow, as several."""
    rows = list(rows)
    if title:
        print_line(title)
    console = terminal()
    if rows and not console.is_terminal:
        # For `grep` and `awk` a row has one line more rather than a word that is cut in two.
        console.width = max(console.width, _table_width(_narrowest(rows).values()))
    for table in tables(rows, console.width):
        console.print(table)


def tables(rows: Sequence[Row], width: int, *, numbers: Collection[str] = (), has_sum: bool = False) -> Iterator[Table]:
    """The rows in as many tables as it takes for none to be wider; each begins with the columns that tell rows apart.

    No word is cut, except one that is too long for a table of its own. Args: numbers: columns that are aligned right;
    has_sum: the last row is set apart.
    """
    if not rows:
        return
    narrowest = _narrowest(rows)
    keys = _keys(rows)
    parts = [list(keys)]
    for column in list(narrowest)[len(keys) :]:
        if len(parts[-1]) > len(keys) and _table_width(narrowest[c] for c in (*parts[-1], column)) > width:
            parts.append(list(keys))
        parts[-1].append(column)
    for part in parts:
        table = Table()
        for column, columns in _widths(rows, {column: narrowest[column] for column in part}, width).items():
            is_number = column in numbers
            table.add_column(column, width=columns, overflow="fold", justify="right" if is_number else "left")
        for number, row in enumerate(rows, start=1):
            if has_sum and number == len(rows):
                table.add_section()
            # Not markup: a detail may hold brackets.
            table.add_row(*(Text(row[column]) for column in part))
        yield table


def _keys(rows: Sequence[Row]) -> list[str]:
    """The first columns, as many as tell the rows apart; the first alone if all do not."""
    columns = list(rows[0])
    for count in range(1, len(columns)):
        if len({tuple(row[column] for column in columns[:count]) for row in rows}) == len(rows):
            return columns[:count]
    return columns[:1]


def _narrowest(rows: Sequence[Row]) -> dict[str, int]:
    """Of each column: characters that the longest word, or cell that is not wrapped, takes."""
    widths = {}
    for column in rows[0]:
        cells = [row[column] for row in rows]
        unbroken = [word for cell in cells for word in ([cell] if cell_len(cell) <= SHORT_CELL else cell.split())]
        widths[column] = max(map(cell_len, [*unbroken, *column.split()]), default=1)
    return widths


def _widths(rows: Sequence[Row], narrowest: Mapping[str, int], width: int) -> dict[str, int]:
    """The columns of one table: what is left is given to those that lack least; what is too much the last one gives."""
    widths = dict(narrowest)
    spare = width - _table_width(widths.values())
    wanted = {column: max(cell_len(text) for text in (column, *(row[column] for row in rows))) for column in widths}
    lacking = sorted(widths, key=lambda column: wanted[column] - widths[column])
    for number, column in enumerate(lacking):
        if spare > 0:
            more = min(wanted[column] - widths[column], spare // (len(lacking) - number))
            widths[column], spare = widths[column] + more, spare - more
    if spare < 0:
        last = list(widths)[-1]
        widths[last] = max(SHORT_CELL, widths[last] + spare)
    return widths


def _table_width(widths: Iterable[int]) -> int:
    """With the lines between the columns, and the blanks beside them."""
    return sum(width + 3 for width in widths) + 1
