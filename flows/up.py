"""Everything that deployments need, in one terminal: Prefect server, work pool, deployments, MLflow page, worker."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from flows.services import HOST, PREFECT, Service, api_url, prefect_server
from specforge_core.process import SupervisedProcess
from tasks.tracking import comparison_url, server_command, tracking_uri

POOL, DEPLOYMENTS = "specbundle", ("build", "run")
"""Of prefect.yaml: those that need nothing but this host."""


def run_services(store: Path, *, prefect_port: int, mlflow_port: int) -> int:
    """Run until Ctrl-C, or until the worker ends; then stop what was started here. A server that answers is used as is.

    Raises: ProcessError or TimeoutError for a server that does not start, with its last lines.
    """
    logs, api = store / "logs", api_url(prefect_port)
    mlflow_url, uri = f"http://{HOST}:{mlflow_port}", tracking_uri(store)
    # The Prefect server needs its own URL too: with another port than 4200 its pages otherwise ask the wrong one.
    env = {**os.environ, "PREFECT_API_URL": api, "PREFECT_LOGGING_EXTRA_LOGGERS": "specforge_core"}
    services = [prefect_server(prefect_port, log=logs / "prefect-server.log", env=env)]
    if uri.startswith("sqlite:"):
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
        pool = ["work-pool", "create", POOL, "--type", "process", "--overwrite"]
        names = [word for name in DEPLOYMENTS for word in ("--name", name)]
        for options in (pool, ["deploy", *names]):
            subprocess.run([*PREFECT, "--no-prompt", *options], env=env, check=True, stdout=subprocess.DEVNULL)
        say(f"Prefect: http://{HOST}:{prefect_port}")
        say(f"MLflow:  {comparison_url(store, port=mlflow_port) or mlflow_url}")
        say(f"build:   PREFECT_API_URL={api} prefect deployment run specbundle/build -p 'only=[\"demo\"]' --watch")
        say(f"again:   PREFECT_API_URL={api} prefect deployment run rebenchmark/run --watch")
        worker = [*PREFECT, "worker", "start", "--pool", POOL, "--type", "process"]
        with SupervisedProcess("worker", worker, log=logs / "worker.log", env=env, on_line=say) as process:
            process.wait()
    return 0


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
