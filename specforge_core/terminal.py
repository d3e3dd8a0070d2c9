"""What commands print: lines and tables, as wide as the terminal; into a file, as wide as a log. Torch-free."""

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 160


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


def print_table(rows: Iterable[Mapping[str, str]], *, title: str | None = None) -> None:
    """Print a table whose columns are the first row's."""
    rows = list(rows)
    if title:
        print_line(title)
    table = Table(*(rows[0] if rows else ()))
    for row in rows:
        # Not markup: a detail may hold brackets.
        table.add_row(*map(Text, row.values()))
    terminal().print(table)
