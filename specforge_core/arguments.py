"""Command-line options: types, which refuse what is out of range as argparse reads it; and those of each measurement.

Torch-free.
"""

import argparse
import math
from pathlib import Path

MAX_PORT = 65_535


def port(text: str) -> int:
    """A TCP port."""
    if not text.isdecimal() or not 0 < int(text) <= MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text} is no port; choose one from 1 to {MAX_PORT}")
    return int(text)


def positive_int(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def add_report_options(parser: argparse.ArgumentParser, directory: Path) -> None:
    """Add what a program that measures is told of its report. Args: directory: where it goes by default."""
    parser.add_argument("--out", type=Path, default=directory, help="default: %(default)s")
    parser.add_argument("--name", help="of the files; the hardware's when absent")
    parser.add_argument("--commit", help="of these sources, where they lie outside a checkout")
