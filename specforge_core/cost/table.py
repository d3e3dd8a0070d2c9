"""Costs as tables for a terminal, and as JSON. Torch-free."""

import json
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specforge_core.cost.estimate import EntryCost, StageCost
from specforge_core.cost.hardware import GIB
from specforge_core.cost.units import duration, quantity

GB = 1e9
COLUMNS = ("stage", "tokens", "on disk", "GPUs", "GPU hours", "wall time", "GiB per GPU", "limited by")


def print_costs(console: Console, costs: Sequence[EntryCost], source: str) -> None:
    """Each entry, what its numbers rest on and what will not work; then all of them together."""

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, soft_wrap=True, markup=False, highlight=False)

    for cost in costs:
        say(entry_title(cost))
        console.print(stage_table(cost))
        for assumption in cost.assumptions:
            say(f"  {assumption}", style="dim")
        for problem in cost.problems:
            say(f"  problem: {problem}", style="yellow")
        say("")
    if len(costs) > 1:
        console.print(total_table(costs))
    if costs:
        say(f"Rates are scaled from {source}")


def as_json(costs: Sequence[EntryCost], unknown: Mapping[str, str], source: str) -> str:
    """The same for programs, in tokens, bytes, seconds and hours."""
    entries = [cost.model_dump(mode="json") for cost in costs]
    return json.dumps({"rates": source, "entries": entries, "not_counted": dict(unknown)}, indent=1)


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
