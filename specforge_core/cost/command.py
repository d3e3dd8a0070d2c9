"""`specbundle plan --cost`. Torch-free."""

import argparse
import sys

from rich.console import Console

from specforge_core.artifacts import Store
from specforge_core.cost.entry import CostPlanner
from specforge_core.cost.table import as_json, print_costs
from specforge_core.manifest import Manifest
from specforge_core.selection import named_entries
from specforge_core.stages import USER_ERROR_STATUS


def plan_cost(args: argparse.Namespace, store: Store, console: Console) -> int:
    """The exit status, after what the entries take is printed; one whose cost cannot be counted says so and does not
    hide the others.
    """
    manifest = Manifest.load(args.manifest)
    entries = named_entries(manifest, args.only) if args.only else manifest.entries
    planner = CostPlanner(
        base_dir=manifest.base_dir,
        store=store,
        reports=args.reports,
        hardware=args.hardware,
        tokens_per_conversation=args.tokens_per_conversation and tuple(args.tokens_per_conversation),
        disk_bytes_per_s=args.disk and args.disk * 1e9,
    )
    costs, unknown = [], {}
    for entry in entries:
        try:
            costs.append(planner.cost(entry))
        except ValueError as error:
            unknown[entry.name] = str(error)
    if args.json:
        sys.stdout.write(as_json(costs, unknown, planner.rates.source) + "\n")
    else:
        print_costs(console, costs, planner.rates.source)
    for name, reason in unknown.items():
        Console(stderr=True).print(f"{name}: {reason}", soft_wrap=True, markup=False, highlight=False)
    return USER_ERROR_STATUS if unknown else 0
