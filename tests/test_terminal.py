"""Tables say all that they have to, however narrow the terminal is."""

import io

import pytest
from rich.console import Console

from specforge_core.terminal import print_table, tables

FOLDER = "/home/someone/specbundle/.specbundle/regenerate/9f663830b89315d0bb36"
SUITES = ("demo-arithmetic", "demo-table", "demo-code")
FIGURES = ("acceptance length", "n-gram", "in process", "tokens/s without", "tokens/s with", "speedup", "lossless")


def report_rows() -> list[dict[str, str]]:
    """Twelve columns, of which the first two tell the rows apart."""
    figures = {figure: f"{number}.25x" for number, figure in enumerate(FIGURES)}
    return [{"entry": "demo", "suite": suite, "chain": "3-1-4", "prompts": "16", **figures} for suite in SUITES]


def printed(rows: list[dict[str, str]], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    for table in tables(rows, width):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_word_is_cut_and_no_line_is_too_wide(width: int) -> None:
    lines = printed(report_rows(), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for word in ("arithmetic", "acceptance", "process", "tokens/s", "speedup", "lossless", "6.25x"):
        assert word in text


def test_each_table_of_many_columns_tells_its_rows_apart() -> None:
    lines = printed(report_rows(), 80)
    num_tables = sum(line.startswith("┏") for line in lines)
    assert num_tables == 2
    for suite in SUITES:
        assert len([line for line in lines if suite in line and "demo " in line]) == num_tables


def test_sentences_wrap_between_words_and_names_do_not() -> None:
    detail = "target answers in 3.1 s, which is more than the 2.0 s that it is allowed"
    lines = printed([{"entry": "llama-4-maverick-17b-128e-instruct", "detail": detail}], 80)
    assert any("llama-4-maverick-17b-128e-instruct" in line for line in lines)
    words = " ".join(line.split("│")[2].strip() for line in lines if line.startswith("│"))
    assert words.strip() == detail
    assert max(map(len, lines)) <= 80


def test_a_folder_stands_whole_where_it_can_and_is_folded_where_it_cannot() -> None:
    rows = [{"stage": "regenerate", "key": "9f663830b89315d0bb36", "content": "54051a4830037744a607", "folder": FOLDER}]
    assert any(FOLDER in line for line in printed(rows, 90))
    narrow = printed(rows, 60)
    assert max(map(len, narrow)) <= 60
    assert FOLDER in "".join(line.split("│")[-2].strip() for line in narrow if line.startswith("│"))


def test_a_cell_is_no_markup() -> None:
    assert any("[red]x[/red]" in line for line in printed([{"detail": "[red]x[/red]"}], 80))


def test_what_is_piped_has_a_row_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"stage": "regenerate", "folder": FOLDER * 3, "content": "54051a4830037744a607"}]
    print_table(rows, title="demo: published")
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "demo: published"
    (row,) = [line for line in lines if "regenerate" in line]
    assert FOLDER * 3 in row
    assert "54051a4830037744a607" in row


def test_no_rows_are_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([])
    assert capsys.readouterr().out == ""
