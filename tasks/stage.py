"""From a stage's spec to a supervised child process and a stored artifact; and the Prefect task round that."""

import functools
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.states import Completed

from specforge_core.artifacts import LOG_NAME, METRICS_NAME, SPEC_NAME, Artifact, Store, write_atomically
from specforge_core.facts import Record
from specforge_core.gpus import NO_DEVICES, Lease, lease_devices
from specforge_core.launch import NODES_VARIABLE, stage_command, stage_environment
from specforge_core.ledger import record_stage
from specforge_core.manifest_publish import Destination
from specforge_core.manifest_sections import Config
from specforge_core.mirror import Mirror
from specforge_core.plan import Recipe
from specforge_core.process import SIGKILL_IN_WORDS, ProcessError, SupervisedProcess, ending
from specforge_core.stages import USER_ERROR_STATUS, StageSpec
from tasks.progress import progress_reader
from tasks.tracking import TrackedRun

FactsT = TypeVar("FactsT", bound=Record)
P = ParamSpec("P")

Logger = logging.Logger | logging.LoggerAdapter[Any]

CPU_SLOT = "cpu"
READ_BEFORE_REUSE = frozenset({"export"})
"""Stages of whose stored files every byte is read: these are the weights that are measured and published."""
MIRROR_VARIABLE = "SPECBUNDLE_MIRROR"
"""URL of a mirror: artifacts are taken from there before they are built, and go there once they are."""
RETRY_DELAYS_S = [5.0, 30.0]
TELLS_NOTHING = re.compile(
    r"(\[rank\d+\]:)?([\s=^~-]*$|\s*Traceback |\s*File \"| {4}|\s*warnings\.warn|.*[Ww]arning: )"
)
"""Rulers, frames of a traceback and their code, warnings of what was left behind: lines that may follow an error's."""


class EntryBuild(Config):
    """One entry on its way through the stages."""

    recipe: Recipe
    store: Path
    gpus: tuple[str, ...]
    """Ids of the GPUs that this host may use."""
    publish_to: Destination
    """Where a draft that passes its gates goes."""
    dry_run: bool = False
    """Only say what publishing would change."""
    tracking: TrackedRun

    @property
    def publish(self) -> bool:
        """Whether a draft that passes its gates is published."""
        return self.publish_to != "none"


class StageResult(NamedTuple, Generic[FactsT]):
    """An artifact, and whether it was there already."""

    artifact: Artifact[FactsT]
    is_reused: bool


class StageError(RuntimeError):
    """A stage whose process failed. Its message is one line, because the run's log has all the others."""

    def __init__(self, stage: str, error: ProcessError, log: Path) -> None:
        self.stage, self.status, self.last_lines = stage, error.status, error.last_lines
        super().__init__(f"stage {stage} {error.outcome}: {_telling_line(error.last_lines)} (whole log: {log})")


def _telling_line(lines: Sequence[str]) -> str:
    """The last line that says something by itself: of an error, its own."""
    printed = [line for line in lines if line.strip()] or ["it printed nothing"]
    telling = next((line for line in reversed(printed) if not TELLS_NOTHING.match(line)), printed[-1])
    # As torchrun says that a process left no exception.
    return telling.strip().removeprefix("traceback : ").replace("(SIGKILL)", f"({SIGKILL_IN_WORDS})")


def run_logger() -> Logger:
    """The logger of the current task or flow run; outside of one, this module's."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(__name__)


def run_stage(spec: StageSpec, build: EntryBuild) -> StageResult[Any]:
    """The artifact of a spec: the stored one, else the mirror's, else the one that the stage's own process builds now.

    Raises: StageError if that process fails or is stopped; what it has done so far is kept for the next try. What the
    mirror raises if it cannot be reached: its artifacts may be worth days.
    """
    store, stage, key = Store(build.store), spec.stage, spec.key()
    mirror, found = _mirror(), _find(spec, key, store)
    result = StageResult(found, is_reused=True) if found else _build(spec, key, build, store, mirror)
    record_stage(build.store, build.recipe.entry.name, stage=stage, key=key)
    if mirror:
        # One that was there already, too: its push may have been interrupted.
        mirror.push(result.artifact)
    if result.is_reused:
        build.tracking.log_metrics_file(result.artifact.path / METRICS_NAME, stage=stage)
    build.tracking.log_artifact_record(result.artifact)
    return result


def _find(spec: StageSpec, key: str, store: Store) -> Artifact[Any] | None:
    return store.find(spec.stage, key, spec.facts_type, read_content=spec.stage in READ_BEFORE_REUSE)


def _build(spec: StageSpec, key: str, build: EntryBuild, store: Store, mirror: Mirror | None) -> StageResult[Any]:
    logger, read_progress = run_logger(), progress_reader(f"{build.recipe.entry.name}-{spec.stage}")

    def on_line(line: str) -> None:
        if line.strip():
            logger.info(line)
            read_progress(line)

    with store.building(spec.stage, key) as (directory, lock_fd):
        # Another build may have made it while this one waited.
        if found := _find(spec, key, store):
            return StageResult(found, is_reused=True)
        if mirror and (taken := _pull(mirror, store, spec.stage, key, spec.facts_type, directory)):
            return StageResult(taken, is_reused=True)
        spec_path = directory / SPEC_NAME
        write_atomically(spec_path, spec.model_dump_json(indent=1) + "\n")
        log, command = directory / LOG_NAME, stage_command(spec, spec_path, directory)
        if NODES_VARIABLE in os.environ and "torch.distributed.run" in command:
            logger.info("on each other node: %s", shlex.join(command))
        with (
            _lease(spec, build) as lease,
            build.tracking.follow(directory / METRICS_NAME, stage=spec.stage),
            build.tracking.watch_host() if spec.stage == "train" else nullcontext(),
            SupervisedProcess(
                f"stage {spec.stage}",
                command,
                log=log,
                env=stage_environment(spec, lease.devices if spec.device == "cuda" else ()),
                on_line=on_line,
                hold_fds=(lock_fd, *lease.fds),
            ) as process,
        ):
            try:
                process.wait()
            except ProcessError as error:
                raise StageError(spec.stage, error, log) from error
        return StageResult(store.commit(directory, spec.stage, key, spec.facts_type), is_reused=False)


def _pull(
    mirror: Mirror, store: Store, stage: str, key: str, facts_type: type[FactsT], directory: Path
) -> Artifact[FactsT] | None:
    """The mirror's artifact, now the store's; None if it has none. Args: directory: where it would be built."""
    pulled = directory.with_name(f".pulling-{key}")
    if not mirror.pull(stage, key, facts_type, pulled):
        return None
    # Nothing goes on from what an interrupted build left.
    shutil.rmtree(directory)
    return store.commit(pulled, stage, key, facts_type)


def find_artifact(recorded: Artifact[FactsT], root: Path) -> Artifact[FactsT] | None:
    """An artifact that a record speaks of, from the store, else from the mirror; None if neither has that content."""
    store, stage, key, facts_type = Store(root), recorded.stage, recorded.key, type(recorded.facts)
    found = store.find(stage, key, facts_type)
    if found is None and (mirror := _mirror()):
        with store.building(stage, key) as (directory, _):
            found = store.find(stage, key, facts_type) or _pull(mirror, store, stage, key, facts_type, directory)
    return found if found and found.content_id == recorded.content_id else None


def _mirror() -> Mirror | None:
    url = os.environ.get(MIRROR_VARIABLE)
    return Mirror(url) if url else None


def device_lock_dir() -> Path:
    """Where the leases of this host's devices lie: common to every store and build of this user."""
    return Path(tempfile.gettempdir()) / f"specbundle-devices-{os.getuid()}"


@contextmanager
def _lease(spec: StageSpec, build: EntryBuild) -> Iterator[Lease]:
    """The devices that a stage computes on, for itself."""
    num_gpus = build.recipe.entry.resources.num_gpus
    if spec.device == "cuda":
        wanted, devices, kind = num_gpus, build.gpus, "gpu"
    elif num_gpus == 0:
        # One CPU stage at a time: each takes every core, and a benchmark must not share them.
        wanted, devices, kind = 1, (CPU_SLOT,), "cpu"
    else:
        # A short CPU stage of an entry that otherwise uses GPUs, or one whose servers run elsewhere.
        yield NO_DEVICES
        return
    with lease_devices(wanted, devices=devices, lock_dir=device_lock_dir() / kind, cancelled=ending) as lease:
        yield lease


def _is_worth_a_retry(task: Any, task_run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageError) and error.status != USER_ERROR_STATUS and not ending.is_set()


def stage_task(*, retries: int = 0) -> Callable[[Callable[P, StageResult[FactsT]]], Callable[P, Artifact[FactsT]]]:
    """Make a Prefect task of a function that runs a stage; calling it gives the artifact.

    A reused artifact shows as `Cached`. Prefect's own cache stays off: it trusts paths whose files are gone.
    Args: retries: only for stages that talk to a network; a diverged loss diverges again.
    """

    def decorate(function: Callable[P, StageResult[FactsT]]) -> Callable[P, Artifact[FactsT]]:
        @task(
            name=function.__name__,
            task_run_name=f"{{build.recipe.entry.name}} {function.__name__}",
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=retries,
            retry_delay_seconds=RETRY_DELAYS_S[:retries],
            retry_condition_fn=_is_worth_a_retry,
        )
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> Any:
            artifact, is_reused = function(*args, **kwargs)
            if is_reused:
                return Completed(name="Cached", message=f"{artifact.key} is up to date", data=artifact)
            return artifact

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Artifact[FactsT]:
            # A task that answers with a state returns that state when it is called; its result is the data either way.
            artifact: Artifact[FactsT] = run(*args, return_state=True, **kwargs).result()
            return artifact

        return call

    return decorate
