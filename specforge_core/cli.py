"""`specbundle build|rebenchmark|plan|list|show|report|rollback|pin|up`: the factory from a shell.

Thin: it reads records, and what it runs is in `flows`. It is the one module here that imports from there, and only once
such a command is given, because Prefect and MLflow take seconds to load. So it alone also sets the environment.
"""

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from specforge_core.arguments import port
from specforge_core.artifacts import SPEC_NAME, Store
from specforge_core.benchmark.headline import headline
from specforge_core.cost.options import add_cost_options, given_cost_options
from specforge_core.engine import sglang_python, sglang_version
from specforge_core.facts import Published, Rejected, Withheld
from specforge_core.gpus import list_gpus
from specforge_core.ledger import EntryRecord, last_artifact, load_entry_record
from specforge_core.manifest import Manifest, ManifestEntry
from specforge_core.plan import STEPS, make_recipe, plan_entry, plan_unbuilt
from specforge_core.process import ProcessError
from specforge_core.selection import missing_gpus, named_entries, select_entries
from specforge_core.stages import USER_ERROR_STATUS, RegenerateSpec
from specforge_core.terminal import print_error, print_line, print_table, terminal

INTERRUPTED_STATUS = 130
DEFAULT_MANIFEST = Path("bundle_manifest.yaml")
PLAN_STYLES = {"fresh": "green", "stale": "yellow", "waits": "dim"}
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # A machine that is busy building takes longer than the 20 s that Prefect allows.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    # Of Prefect's own lines the warnings; of the runs' lines all, each under the name of its run.
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FORMAT": "%(levelname)s: %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(flow_run_name)s | %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(task_run_name)s | %(message)s",
}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 for an entry that did not pass, 2 for what a user must change, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        status: int = args.command(args)
    except (ValueError, OSError, ProcessError) as error:
        print_error(f"error: {error}")
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        print_error("interrupted; the same command goes on from what is done")
        return INTERRUPTED_STATUS
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specbundle", description="Draft models for speculative decoding, by manifest."
    )
    parser.add_argument("--manifest", type=Path, default=DEFAULT_MANIFEST, help="default: %(default)s")
    parser.add_argument("--store", type=Path, help="folder of the artifacts; default: .specbundle beside the manifest")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        return added

    _add_run_options(add("build", build, "Build the entries, and publish the drafts that pass their gates."))
    again = "Measure published drafts again, on this host's engine and hardware, and renew card, registry and site."
    _add_run_options(add("rebenchmark", rebenchmark, again))
    plan_parser = add("plan", plan, "Say which stages a build would run, and why; run nothing.")
    plan_parser.add_argument("--only", nargs="+", metavar="ENTRY", help="default: every entry")
    add_cost_options(plan_parser)
    add("list", list_entries, "List the entries of the manifest with their last results.")
    show_parser = add("show", show, "Show an entry's artifacts, or a conversation that its draft was trained on.")
    show_parser.add_argument("what", metavar="ENTRY|conversation")
    show_parser.add_argument("--entry", default="demo", help="whose conversations; default: %(default)s")
    show_parser.add_argument("--index", default="0", help="position of the conversation, or the start of its id")
    report_parser = add("report", report, "Print what the last builds measured, and write the site of all results.")
    report_parser.add_argument("entries", nargs="*", metavar="ENTRY", help="default: every entry that was built")
    report_parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the site; default: site in the store")
    rollback_parser = add("rollback", rollback, "Publish an older draft of an entry again, in place of its champion.")
    rollback_parser.add_argument("entry", metavar="ENTRY")
    rollback_parser.add_argument(
        "--to", type=int, metavar="VERSION", help="in the registry; default: the champion before this one"
    )
    add("pin", pin, "Replace each branch of a Hub repository in the manifest by its commit.")
    up_parser = add("up", up, "Start server, work pool, deployment, MLflow page and worker, until Ctrl-C.")
    up_parser.add_argument("--prefect-port", type=port, default=4200, help="default: %(default)s")
    up_parser.add_argument("--mlflow-port", type=port, default=5000, help="default: %(default)s")
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", metavar="ENTRY", help="default: all that this host has the GPUs for")
    destination = parser.add_mutually_exclusive_group()
    destination.add_argument(
        "--publish-to", choices=("hub", "directory", "none"), help="default: `publish.to` of each entry"
    )
    destination.add_argument(
        "--no-publish", dest="publish_to", action="store_const", const="none", help="stop after the gates"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="instead of publishing, write the folder and what it would change"
    )


def build(args: argparse.Namespace) -> int:
    """Run the flow `specbundle`."""
    return _run_flow(args, "specbundle")


def rebenchmark(args: argparse.Namespace) -> int:
    """Run the flow `rebenchmark`."""
    return _run_flow(args, "rebenchmark")


def _run_flow(args: argparse.Namespace, name: str) -> int:
    """Run a flow over the manifest in this process; then print its summary and where to look next."""
    # What a user got wrong is said before Prefect starts.
    if args.dry_run and args.publish_to == "none":
        raise ValueError("a dry run says what publishing would change: leave out --dry-run or say where to publish")
    manifest = Manifest.load(args.manifest)
    num_gpus = len(_gpus())
    entries, skipped = select_entries(manifest, only=args.only, num_gpus=num_gpus)
    if missing := [reason for entry in entries if (reason := missing_gpus(entry, num_gpus))]:
        raise ValueError(f"{'; '.join(missing)}; build on a host that has them, or choose others with --only")
    store = _store(args).root
    store.mkdir(parents=True, exist_ok=True)
    if not os.access(store, os.W_OK):
        raise ValueError(f"the store {store} cannot be written; name another with --store")
    from flows.services import start_own_prefect_server

    is_own = start_own_prefect_server(store / "logs" / "prefect-server.log")
    from flows import rebenchmark, specbundle
    from flows.log_filter import quieten_runs
    from flows.summary import BuildSummary

    quieten_runs(has_pages=not is_own)
    # Such as what it waits for.
    logging.getLogger("specforge_core").setLevel(logging.INFO)
    flow = {"specbundle": specbundle.specbundle, "rebenchmark": rebenchmark.rebenchmark}[name]
    state = flow(
        manifest=args.manifest, only=args.only, publish_to=args.publish_to, dry_run=args.dry_run, store=args.store,
        return_state=True,
    )  # fmt: skip
    summary = state.result(raise_on_failure=False)
    if not isinstance(summary, BuildSummary):
        print_error(f"error: {summary}")
        return 1
    for row in summary.rows:
        if row.status == "skipped" and row.entry not in skipped:
            print_error(f"skipped: {row.detail}")
    print_table([row.cells() for row in summary.rows if row.status != "skipped"], title=summary.message)
    for line in summary.next_steps(_command(args)):
        print_line(line)
    return int(summary.is_failure)


def _command(args: argparse.Namespace) -> str:
    """How this command's manifest and store are named in another one."""
    words = ["specbundle"]
    if args.manifest != DEFAULT_MANIFEST:
        words += ["--manifest", str(args.manifest)]
    if args.store:
        words += ["--store", str(args.store)]
    return shlex.join(words)


def plan(args: argparse.Namespace) -> int:
    """Print each stage's state; an entry whose target or data cannot be pinned says so and does not hide the others."""
    if args.cost:
        # It reads every report and takes a moment.
        from specforge_core.cost.command import plan_cost

        return plan_cost(args, _store(args), terminal())
    if given := given_cost_options(args):
        raise ValueError(f"only the cost depends on {', '.join(given)}; add --cost")
    manifest, store, gpus = Manifest.load(args.manifest), _store(args), _gpus()
    entries, status = named_entries(manifest, args.only) if args.only else manifest.entries, 0
    if any(entry.engine.name == "sglang" for entry in entries):
        print_line(_sglang_line())
    for entry in entries:
        print_line(_plan_title(entry, len(gpus)))
        table = Table(show_header=False)
        try:
            recipe = make_recipe(entry, base_dir=manifest.base_dir, store=store.root, gpus=gpus, environ=os.environ)
            stages = plan_entry(recipe, store)
        except (ValueError, ConnectionError) as error:
            table.add_row(Text("unknown", style="red"), Text(str(error)))
            # Without the Hub nobody knows what an entry would read, but one without artifacts starts at the front.
            is_offline = isinstance(error, ConnectionError)
            stages = plan_unbuilt() if is_offline and not load_entry_record(store.root, entry.name).keys else []
            status = status if is_offline else USER_ERROR_STATUS
        for stage, state, reason in stages:
            table.add_row(stage, Text(state, style=PLAN_STYLES[state]), Text(reason))
        terminal().print(table)
    return status


def _sglang_line() -> str:
    python = sglang_python(os.environ)
    try:
        return f"SGLang: {sglang_version(python)} at {python}"
    except ValueError as error:
        return f"SGLang: {error}"


def _plan_title(entry: ManifestEntry, num_gpus: int) -> str:
    notes = [missing_gpus(entry, num_gpus)]
    if entry.target.trust_remote_code:
        notes.append("trust_remote_code: Python code of the target's repository runs")
    noted = "".join(f" ({note})" for note in notes if note)
    return f"{entry.name}: {entry.draft.algorithm} draft for {entry.target.model}{noted}"


def list_entries(args: argparse.Namespace) -> int:
    """Print one row per entry."""
    store = _store(args)
    print_table(
        {
            "entry": entry.name,
            "target": entry.target.model,
            "algorithm": entry.draft.algorithm,
            "GPUs": str(entry.resources.num_gpus or "CPU"),
            "last result": _last_result(store, entry.name),
        }
        for entry in Manifest.load(args.manifest).entries
    )
    return 0


def _last_result(store: Store, name: str) -> str:
    record = load_entry_record(store.root, name)
    benchmark = last_artifact(store, name, "benchmark")
    means = headline(benchmark.facts) if benchmark else None
    if means is None:
        return f"in progress: {', '.join(record.keys)} done" if record.keys else "never built"
    return f"{_outcome(record)}: acceptance length {means.acceptance_length:.2f}, speedup {means.speedup:.2f}x"


def _outcome(record: EntryRecord) -> str:
    match record.outcome:
        case Published():
            return "published"
        case Rejected():
            return "rejected"
        case Withheld():
            return "passed"
        case None:
            return "being built again; before"


def show(args: argparse.Namespace) -> int:
    """Print an entry's artifacts, or one of its conversations."""
    store = _store(args)
    if args.what != "conversation":
        return _show_entry(store, Manifest.load(args.manifest), args.what)
    conversations = last_artifact(store, args.entry, "regenerate")
    if conversations is None:
        raise ValueError(f"{args.entry} has no conversations yet; `specbundle build --only {args.entry}` makes them")
    # It brings transformers.
    from specforge_core.data.viewer import show_conversation

    spec = RegenerateSpec.model_validate_json((conversations.path / SPEC_NAME).read_text(encoding="utf-8"))
    show_conversation(conversations.path, id_or_index=args.index, target=spec.target)
    return 0


def _show_entry(store: Store, manifest: Manifest, name: str) -> int:
    (entry,) = named_entries(manifest, [name])
    record = load_entry_record(store.root, entry.name)
    artifacts = [artifact for stage in STEPS if (artifact := last_artifact(store, name, stage))]
    print_table(
        (
            {
                "stage": artifact.stage,
                "key": artifact.key,
                "content": artifact.content_id,
                "made at": f"{artifact.created_at:%Y-%m-%d %H:%M} UTC",
                "seconds": f"{artifact.elapsed_s:,.0f}",
                "MB": f"{sum(file.size_bytes for file in artifact.files.values()) / 1e6:,.1f}",
                "folder": str(artifact.path),
            }
            for artifact in artifacts
        ),
        title=f"{entry.name}: {_last_result(store, name)}",
    )
    match record.outcome:
        case Published(path=path, content_id=content_id):
            print_line(f"published: {path} ({content_id})")
        case Rejected(failures=failures):
            for failure in failures:
                print_line(f"gate {failure.gate}: {failure.message}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Print one row per measurement, where the whole reports are, and the address of the site."""
    from specforge_core.benchmark.history import load_history
    from specforge_core.benchmark.tables import measurement_row, without_empty_columns

    store = _store(args).root
    files = [store / "reports" / f"{name}.json" for name in args.entries] or sorted((store / "reports").glob("*.json"))
    missing = [file.stem for file in files if not file.is_file()]
    if missing or not files:
        which = ", ".join(missing) or "any entry"
        raise ValueError(f"no report of {which} in {store / 'reports'}; `specbundle build` writes one")
    histories = {file.stem: load_history(store, file.stem) for file in files}
    last = {name: history.reports[-1].report for name, history in histories.items() if history.reports}
    rows = [{"entry": n} | measurement_row(m) for n, made in last.items() for m in made.benchmark.measurements]
    print_table(without_empty_columns(rows))
    for file in files:
        print_line(f"whole report: {file.with_suffix('.md')}")
    # It asks the tracker, which takes seconds.
    from tasks.site import write_site

    index = write_site(store, Manifest.load(args.manifest).entries, out=args.out)
    print_line(f"site: {index.as_uri()}")
    return 0


def rollback(args: argparse.Namespace) -> int:
    """Go back, and print from which version to which."""
    manifest = Manifest.load(args.manifest)
    (entry,) = named_entries(manifest, [args.entry])
    from tasks.rollback import roll_back
    from tasks.site import update_site

    store = _store(args).root
    (left, to, undone), published = roll_back(entry, args.to, base_dir=manifest.base_dir, store=store)
    update_site(store, manifest.entries)
    print_line(
        f"{entry.name}: version {left.number} is replaced by version {to.number}, at {published.url or published.path}"
    )
    for version in undone:
        print_line(f"no build publishes version {version.number} again; to take it back: --to {version.number}")
    return 0


def pin(args: argparse.Namespace) -> int:
    """Rewrite the manifest, and print what changed."""
    from specforge_core.resolve import pin as pin_manifest

    for line in pin_manifest(args.manifest) or ["every Hub revision is a commit already"]:
        print_line(line)
    return 0


def up(args: argparse.Namespace) -> int:
    """Run until Ctrl-C."""
    Manifest.load(args.manifest)
    store = _store(args).root
    if args.prefect_port == args.mlflow_port:
        raise ValueError(f"--prefect-port and --mlflow-port are both {args.mlflow_port}; choose two ports")
    from flows.up import run_services

    # Without --store that of a run is beside its manifest, whichever it is given.
    parameters = {"manifest": args.manifest.absolute()} | ({"store": store} if args.store else {})
    return run_services(
        store,
        {name: str(path) for name, path in parameters.items()},
        prefect_port=args.prefect_port,
        mlflow_port=args.mlflow_port,
    )


def _store(args: argparse.Namespace) -> Store:
    root = args.store or args.manifest.absolute().parent / ".specbundle"
    if root.exists() and not root.is_dir():
        raise ValueError(f"the store {root} is a file; name a folder with --store")
    return Store(root)


def _gpus() -> tuple[Any, ...]:
    return list_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))


if __name__ == "__main__":
    sys.exit(main())
