"""What MLflow tracks: one run per build, one per entry, curves that grow while stages run.

Two experiments, because MLflow's chart view compares the runs of one experiment and hides nested ones. A run is named
by URI and id, so that tasks on any thread can add to it. Tracking that fails warns once and is left out from there on.
"""

import contextlib
import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec
from urllib.parse import urlencode

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from specforge_core.artifacts import RECORD_NAME, Artifact
from specforge_core.curves import metric_points, whole_lines
from specforge_core.facts import BenchmarkResult
from specforge_core.manifest_sections import Config
from tasks.comparison import QUERY, SHOWN, SHOWN_TAG, VIEW_TAG, comparison_view, result_curves, result_metrics
from tasks.database import database_at

logger = logging.getLogger(__name__)

BUILDS = "specbundle-builds"
ENTRIES = "specbundle-entries"
FOLLOW_INTERVAL_S = 2.0
# MLflow's limits of one request.
MAX_METRICS_PER_CALL = 1000
MAX_PARAMS_PER_CALL = 100
MAX_PARAM_CHARS = 6000
CLIENT_ENVIRONMENT = {
    # Without these two a server that is gone holds a build for minutes before tracking gives up.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
HOST, PORT = "127.0.0.1", 5000

P = ParamSpec("P")

_failed_uris: set[str] = set()


def tracking_uri(store: Path) -> str:
    """MLFLOW_TRACKING_URI, else a sqlite database in the store: an absolute path, whatever the current directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.absolute() / 'mlflow.db'}"


def is_file(uri: str) -> bool:
    """Whether what tracks is a database file of this host, and no server."""
    return uri.startswith("sqlite:///")


def server_command(uri: str, *, port: int = PORT) -> list[str]:
    """The command that shows a database of this host in a browser."""
    return ["mlflow", "server", "--backend-store-uri", uri, "--host", HOST, "--port", str(port), "--workers", "1"]


@functools.lru_cache(maxsize=8)
def mlflow_client(uri: str) -> MlflowClient:
    """The client of a server or a database file. Raises: ValueError for a file that cannot be opened."""
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with database_at(uri) if is_file(uri) else contextlib.nullcontext():
        return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def never_fails(uri: str) -> Iterator[None]:
    """Around every use of MLflow: a tracking server is no reason to lose a build."""
    try:
        yield
    except Exception as error:
        if uri not in _failed_uris:
            _failed_uris.add(uri)
            logger.warning(
                "tracking at %s fails, and the build goes on without it: %s",
                without_passwords(uri),
                without_passwords(str(error)),
            )


def without_passwords(text: str) -> str:
    """A text without the user and password that a URL in it may have."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def tracking_works(uri: str) -> None:
    """Use a server again that failed before."""
    _failed_uris.discard(uri)


def _tracked(method: Callable[Concatenate["TrackedRun", P], None]) -> Callable[Concatenate["TrackedRun", P], None]:
    """A method that does nothing where tracking has failed, and never raises."""

    @functools.wraps(method)
    def call(run: "TrackedRun", *args: P.args, **kwargs: P.kwargs) -> None:
        if run.is_tracked:
            with never_fails(run.uri):
                method(run, *args, **kwargs)

    return call


class TrackedRun(Config):
    """One MLflow run; without an id, tracking failed to start and every method does nothing."""

    uri: str
    run_id: str | None = None

    @property
    def is_tracked(self) -> bool:
        """Whether what is added to it is kept."""
        return self.run_id is not None and self.uri not in _failed_uris

    @_tracked
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Add parameters, one for each leaf of nested values."""
        leaves = [Param(name, value[:MAX_PARAM_CHARS]) for name, value in _leaves(params)]
        for start in range(0, len(leaves), MAX_PARAMS_PER_CALL):
            mlflow_client(self.uri).log_batch(self.run_id, params=leaves[start : start + MAX_PARAMS_PER_CALL])

    @_tracked
    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags."""
        mlflow_client(self.uri).log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    @_tracked
    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add final values."""
        self.log_curves({name: {0: value} for name, value in metrics.items()})

    @_tracked
    def log_curves(self, curves: Mapping[str, Mapping[int, float]]) -> None:
        """Add metrics with a value at each of several steps."""
        now_ms = int(time.time() * 1000)
        _send(self, [Metric(k, v, now_ms, step) for k, curve in curves.items() for step, v in curve.items()])

    @_tracked
    def log_file(self, path: Path) -> None:
        """Keep a copy of a file with the run."""
        mlflow_client(self.uri).log_artifact(self.run_id, str(path))

    @_tracked
    def log_text(self, name: str, text: str) -> None:
        """Keep a text with the run, as a file of this name."""
        mlflow_client(self.uri).log_text(self.run_id, text, name)

    @_tracked
    def log_artifact_record(self, artifact: Artifact[Any]) -> None:
        """Tag the run with an artifact's digests, and keep its record."""
        stage, client = artifact.stage, mlflow_client(self.uri)
        digests = {"key": artifact.key, "content_id": artifact.content_id}
        inputs = {f"input.{name}": content_id for name, content_id in artifact.inputs.items()}
        tags = [RunTag(f"{stage}.{name}", value) for name, value in (digests | inputs).items()]
        client.log_batch(self.run_id, tags=tags)
        client.log_artifact(self.run_id, str(artifact.path / RECORD_NAME), artifact_path=stage)

    @_tracked
    def log_result(self, result: BenchmarkResult) -> None:
        """Add the figures that entries are compared by, and the curves over load and position."""
        self.log_metrics(result_metrics(result))
        self.log_curves(result_curves(result))

    @_tracked
    def log_metrics_file(self, path: Path, *, stage: str) -> None:
        """Add the whole curves of a stage that ran before."""
        _MetricsFile(path, stage).send(self)

    @contextlib.contextmanager
    def follow(self, path: Path, *, stage: str) -> Iterator[None]:
        """Meanwhile, and once more at the end, add what the stage appends to its metrics file."""
        file, done = _MetricsFile(path, stage), threading.Event()

        def send_until_done() -> None:
            while not done.wait(FOLLOW_INTERVAL_S):
                self._send_new(file)
            self._send_new(file)

        follower = threading.Thread(target=send_until_done, name=f"metrics of {stage}", daemon=True)
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()

    @contextlib.contextmanager
    def watch_host(self) -> Iterator[None]:
        """Meanwhile add how busy this host's processors, memory, disks and GPUs are (`system/`), every few seconds.

        From this process: the one that trains has better things to do.
        """
        with contextlib.ExitStack() as watching:
            self._watch(watching)
            yield

    @_tracked
    def _watch(self, watching: contextlib.ExitStack) -> None:
        monitor = SystemMetricsMonitor(self.run_id, tracking_uri=self.uri)
        monitor.start()
        watching.callback(monitor.finish)

    @_tracked
    def _send_new(self, file: "_MetricsFile") -> None:
        file.send(self)

    @_tracked
    def end(self, status: Literal["FINISHED", "FAILED"]) -> None:
        """Close the run."""
        mlflow_client(self.uri).set_terminated(self.run_id, status)


def comparison_url(store: Path, *, port: int = PORT) -> str | None:
    """The page that charts the runs of all entries side by side, arranged for them; None while there are none."""
    uri = tracking_uri(store)
    experiment = None
    if uri not in _failed_uris:
        with never_fails(uri):
            client = mlflow_client(uri)
            if experiment := client.get_experiment_by_name(ENTRIES):
                _arrange(client, experiment)
    if experiment is None:
        return None
    base = without_passwords(uri) if uri.startswith("http") else f"http://{HOST}:{port}"
    return f"{base.rstrip('/')}/#/experiments/{experiment.experiment_id}/runs?{urlencode(QUERY)}"


def _arrange(client: MlflowClient, experiment: Experiment) -> None:
    shown = client.search_runs([experiment.experiment_id], SHOWN)
    view = comparison_view(name for run in shown for name in run.data.metrics)
    if experiment.tags.get(VIEW_TAG) != view:
        client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, view)


def start_run(experiment: str, name: str, *, store: Path, tags: Mapping[str, str]) -> TrackedRun:
    """A new run in that experiment, which is created if need be.

    Raises: ValueError for a database file that cannot be opened: unlike a server it will not be back tomorrow.
    """
    uri = tracking_uri(store)
    if is_file(uri):
        mlflow_client(uri)
    with never_fails(uri):
        client = mlflow_client(uri)
        experiment_id = _experiment_id(client, experiment, store)
        run = client.create_run(experiment_id, run_name=name, tags={SHOWN_TAG: "true", **tags})
        # A server that came back is given another chance with each new run.
        tracking_works(uri)
        return TrackedRun(uri=uri, run_id=run.info.run_id)
    return TrackedRun(uri=uri)


_create_lock = threading.Lock()


def _experiment_id(client: MlflowClient, name: str, store: Path) -> str:
    with _create_lock:
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        # A server decides for itself where its artifacts lie.
        location = (store.absolute() / "mlflow" / name).as_uri() if is_file(client.tracking_uri) else None
        return str(client.create_experiment(name, artifact_location=location))


class _MetricsFile:
    """The lines of a `metrics.jsonl` that were not sent yet.

    Lines are known by their text, not by their place: a resumed stage takes back those after its checkpoint and writes
    them again.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self._path, self._stage = path, stage
        self._sent: set[bytes] = set()

    def send(self, run: TrackedRun) -> None:
        new = [line for line in whole_lines(self._path) if line not in self._sent]
        self._sent.update(new)
        now_ms = int(time.time() * 1000)
        points = metric_points(new)
        _send(run, [Metric(n if "/" in n else f"{self._stage}/{n}", value, now_ms, step) for n, step, value in points])


def _send(run: TrackedRun, metrics: Sequence[Metric]) -> None:
    for start in range(0, len(metrics), MAX_METRICS_PER_CALL):
        mlflow_client(run.uri).log_batch(run.run_id, metrics=metrics[start : start + MAX_METRICS_PER_CALL])


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else str(name))
    else:
        yield path, str(value)
