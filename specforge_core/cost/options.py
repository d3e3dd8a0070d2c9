"""Options of `specbundle plan --cost`. Torch-free."""

import argparse
from pathlib import Path

from specforge_core.arguments import positive_float, positive_int

REPORTS = Path(__file__).parents[2] / "reports"
"""Of the checkout that this program runs from."""
OPTIONS = ("hardware", "disk", "json", "reports", "tokens-per-conversation")


def add_cost_options(parser: argparse.ArgumentParser) -> None:
    """Add `--cost` and the options that go with it."""
    add = parser.add_argument_group("cost", "from the targets' configs and measured rates alone").add_argument
    add("--cost", action="store_true", help="say instead what a build takes, by entry and stage, and what will not fit")
    add("--hardware", metavar="NAME", help="GPU to count for, such as h200; default: that of the measurements")
    add("--disk", type=positive_float, metavar="GB/s", help="of a host, read and written; default: as measured")
    add("--json", action="store_true", help="print it for programs")
    add("--reports", type=Path, default=REPORTS, help="folder of the measured rates; default: %(default)s")
    add(
        "--tokens-per-conversation", nargs=2, type=positive_int, metavar=("PROMPT", "ANSWER"),
        help="default: those in the store, or an assumption that is printed",
    )  # fmt: skip


def given_cost_options(args: argparse.Namespace) -> list[str]:
    """Those besides `--cost` that differ from their defaults."""
    return [f"--{name}" for name in OPTIONS if getattr(args, name.replace("-", "_")) not in (None, False, REPORTS)]
