"""Everything that deployments need, in one terminal: Prefect server, work pool, deployments, MLflow page, worker."""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from flows.services import HOST, PREFECT, Service, api_url, is_up, prefect_server
from specforge_core.process import NUM_LAST_LINES, ProcessError, SupervisedProcess
from tasks.tracking import comparison_url, is_file, mlflow_client, server_command, tracking_uri

CHECKOUT = Path(__file__).parents[1]
"""Where prefect.yaml is, and the flows that it names."""
POOL, DEPLOYMENTS = "specbundle", ("build", "run")
"""Of prefect.yaml: those that need nothing but this host."""


def run_services(store: Path, parameters: Mapping[str, str], *, prefect_port: int, mlflow_port: int) -> int:
    """Run until Ctrl-C, or until the worker ends; then stop what was started here. A server that answers is used as is.

    Args: parameters: what a run of a deployment is given unless it is started with others.
    Raises: ValueError for a port that something else uses or a tracker's database that cannot be opened; ProcessError
    or TimeoutError for a server that does not start, with its last lines.
    """
    logs, api = store / "logs", api_url(prefect_port)
    mlflow_url, uri = f"http://{HOST}:{mlflow_port}", tracking_uri(store)
    serves_mlflow = is_file(uri)
    if not is_up(f"{api}/health"):
        check_port(prefect_port, option="--prefect-port")
    if serves_mlflow and not is_up(f"{mlflow_url}/health"):
        check_port(mlflow_port, option="--mlflow-port")
    if serves_mlflow:
        # Made here: the page's server would not wait for a build that makes it too.
        mlflow_client(uri)
    # The Prefect server needs its own URL too: with another port than 4200 its pages otherwise ask the wrong one.
    env = {**os.environ, "PREFECT_API_URL": api, "PREFECT_LOGGING_EXTRA_LOGGERS": "specforge_core"}
    services = [prefect_server(prefect_port, log=logs / "prefect-server.log", env=env)]
    if serves_mlflow:
        # Of its background workers nothing here makes use.
        page_env = {**env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [sys.executable, "-m", *server_command(uri, port=mlflow_port)]
        log = logs / "mlflow.log"
        services.append(Service("MLflow page", command, health_url=f"{mlflow_url}/health", log=log, env=page_env))
    with ExitStack() as stack:
        say(f"starting; the logs are in {logs}")
        for service in services:
            stack.enter_context(service)
        for service in services:
            service.wait_ready()
        run_prefect(["work-pool", "create", POOL, "--type", "process", "--overwrite"], env)
        for name in DEPLOYMENTS:
            run_prefect(["deploy", "--name", name, "--params", json.dumps(dict(parameters))], env)
        say(f"Prefect: http://{HOST}:{prefect_port}")
        say(f"MLflow:  {comparison_url(store, port=mlflow_port) or mlflow_url}")
        say(f"build:   PREFECT_API_URL={api} prefect deployment run specbundle/build -p 'only=[\"demo\"]' --watch")
        say(f"again:   PREFECT_API_URL={api} prefect deployment run rebenchmark/run --watch")
        worker = [*PREFECT, "worker", "start", "--pool", POOL, "--type", "process"]
        with SupervisedProcess("worker", worker, log=logs / "worker.log", env=env, on_line=say) as process:
            process.wait()
    return 0


def check_port(port: int, *, option: str) -> None:
    """Return if a server can listen there. Raises: ValueError that names the option for another port."""
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise ValueError(
            f"port {port} of {HOST}: {os.strerror(error.errno or 0)}; choose another with {option}"
        ) from None


def run_prefect(arguments: Sequence[str], env: Mapping[str, str]) -> None:
    """Return when this command of Prefect's is done. Raises: ProcessError with the last lines that it printed."""
    command = [*PREFECT, "--no-prompt", *arguments]
    done = subprocess.run(
        command, cwd=CHECKOUT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        name = f"prefect {shlex.join(arguments)}"
        raise ProcessError(name, done.returncode, done.stdout.splitlines()[-NUM_LAST_LINES:])


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
