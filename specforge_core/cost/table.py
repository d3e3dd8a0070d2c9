"""Costs as tables for a terminal, and as JSON. Torch-free."""

import json
from collections.abc import Mapping, Sequence

from rich.console import Console

from specforge_core.cost.estimate import EntryCost, StageCost
from specforge_core.cost.hardware import GIB
from specforge_core.cost.units import duration, quantity
from specforge_core.terminal import Row, tables

GB = 1e9
COLUMNS = ("stage", "tokens", "on disk", "GPUs", "GPU hours", "wall time", "GiB per GPU", "limited by")


def print_costs(console: Console, costs: Sequence[EntryCost], source: str) -> None:
    """Each entry, what its numbers rest on and what will not work; then all of them together."""

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, soft_wrap=True, markup=False, highlight=False)

    def show(rows: Sequence[Row], numbers: Sequence[str]) -> None:
        for table in tables(rows, console.width, numbers=numbers, has_sum=True):
            console.print(table)

    for cost in costs:
        say(entry_title(cost))
        show(stage_rows(cost), COLUMNS[1:-1])
        for assumption in cost.assumptions:
            say(f"  {assumption}", style="dim")
        for problem in cost.problems:
            say(f"  problem: {problem}", style="yellow")
        say("")
    if len(costs) > 1:
        rows = total_rows(costs)
        show(rows, list(rows[0])[2:])
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


def stage_rows(cost: EntryCost) -> list[dict[str, str]]:
    """One row a stage, and their sum."""
    total = ("all", "", f"{quantity(cost.disk_bytes)}B", "", f"{cost.gpu_hours:,.1f}", duration(cost.wall_s), "", "")
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in (*map(_cells, cost.stages), total)]


def total_rows(costs: Sequence[EntryCost]) -> list[dict[str, str]]:
    """One row an entry, and their sum."""
    rows = [
        {
            "entry": cost.entry,
            "on": f"{cost.num_gpus} x {cost.hardware}" if cost.num_gpus else "CPU",
            "target": f"{quantity(cost.weight_bytes)}B",
            "on disk": f"{quantity(cost.disk_bytes)}B",
            "GPU hours": f"{cost.gpu_hours:,.1f}",
            "wall time": duration(cost.wall_s),
            "problems": str(len(cost.problems) or ""),
        }
        for cost in costs
    ]
    sums = {
        "entry": "all",
        "target": f"{quantity(sum(cost.weight_bytes for cost in costs))}B",
        "on disk": f"{quantity(sum(cost.disk_bytes for cost in costs))}B",
        "GPU hours": f"{sum(cost.gpu_hours for cost in costs):,.1f}",
    }
    return [*rows, dict.fromkeys(rows[0], "") | sums]


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
