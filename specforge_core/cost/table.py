"""Costs as tables for a terminal. Torch-free."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from specforge_core.cost.estimate import EntryCost, StageCost
from specforge_core.cost.hardware import GIB

GB = 1e9
COLUMNS = ("stage", "tokens", "on disk", "GPUs", "GPU hours", "wall time", "GiB per GPU", "limited by")
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MINUTE_S, HOUR_S = 60, 3600


def entry_title(cost: EntryCost) -> str:
    """One line about the entry."""
    experts = ""
    if cost.num_active_parameters < cost.num_parameters / 2:
        experts = f", {cost.num_active_parameters / GB:,.1f} B of them active"
    on = f"{cost.num_gpus} x {cost.hardware}" if cost.num_gpus else cost.hardware
    return (
        f"{cost.entry}: {cost.target}, {cost.num_parameters / GB:,.2f} B parameters{experts}, "
        f"{quantity(cost.weight_bytes)}B of weights; on {on}"
    )


def stage_table(cost: EntryCost) -> Table:
    """One row a stage, and their sum."""
    table = Table()
    for number, column in enumerate(COLUMNS):
        is_words = number in (0, len(COLUMNS) - 1)
        table.add_column(column, justify="left" if is_words else "right")
    for stage in cost.stages:
        table.add_row(*map(Text, _cells(stage)))
    table.add_section()
    total = ("all", "", f"{quantity(cost.disk_bytes)}B", "", f"{cost.gpu_hours:,.1f}", duration(cost.wall_s), "", "")
    table.add_row(*map(Text, total))
    return table


def total_table(costs: Sequence[EntryCost]) -> Table:
    """One row an entry, and their sum."""
    table = Table("entry", "on")
    for column in ("target", "on disk", "GPU hours", "wall time", "problems"):
        table.add_column(column, justify="right")
    for cost in costs:
        on = f"{cost.num_gpus} x {cost.hardware}" if cost.num_gpus else "CPU"
        numbers = (f"{quantity(cost.weight_bytes)}B", f"{quantity(cost.disk_bytes)}B", f"{cost.gpu_hours:,.1f}")
        problems = Text(str(len(cost.problems) or ""), style="red")
        table.add_row(cost.entry, on, *numbers, duration(cost.wall_s), problems)
    table.add_section()
    sums = [sum(values) for values in zip(*((c.weight_bytes, c.disk_bytes, c.gpu_hours) for c in costs), strict=True)]
    table.add_row("all", "", f"{quantity(sums[0])}B", f"{quantity(sums[1])}B", f"{sums[2]:,.1f}", "", "")
    return table


def quantity(number: float) -> str:
    """Three digits and a unit of 1000s, to be followed by the name of what is counted."""
    for size, unit in UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} "


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds >= HOUR_S:
        return f"{seconds / HOUR_S:,.1f} h"
    return f"{seconds / MINUTE_S:.0f} min" if seconds >= MINUTE_S else f"{seconds:.0f} s"


def _cells(stage: StageCost) -> tuple[str, ...]:
    return (
        stage.stage,
        quantity(stage.num_tokens).strip() if stage.num_tokens else "",
        f"{quantity(stage.disk_bytes)}B" if stage.disk_bytes else "",
        str(stage.num_gpus or ""),
        f"{stage.gpu_hours:,.2f}" if stage.num_gpus else "",
        duration(stage.wall_s) if stage.wall_s else "",
        f"{stage.peak_bytes_per_gpu / GIB:,.0f}" if stage.peak_bytes_per_gpu else "",
        stage.limit,
    )
