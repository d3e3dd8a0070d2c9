"""Everything that a deployment needs, in one terminal: Prefect server, work pool, deployment, MLflow page, worker."""

import logging
import os
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from specforge_core.process import SupervisedProcess
from tasks.tracking import comparison_url, server_command, tracking_uri

logger = logging.getLogger(__name__)

POOL = "specbundle"
STARTUP_TIMEOUT_S = 180.0
HOST = "127.0.0.1"


def run_services(store: Path, *, prefect_port: int, mlflow_port: int) -> int:
    """Run until Ctrl-C, or until the worker ends; then stop what was started here. A server that answers is used as is.

    Raises: ProcessError or TimeoutError for a service that does not start, with its last lines.
    """
    api_url = f"http://{HOST}:{prefect_port}/api"
    # The server too: with another port than 4200 its pages otherwise ask the wrong one.
    env = {**os.environ, "PREFECT_API_URL": api_url}
    logs = store / "logs"
    with ExitStack() as services:
        prefect = [sys.executable, "-m", "prefect"]
        if not is_up(f"{api_url}/health"):
            say(f"starting the Prefect server, log: {logs / 'prefect-server.log'}")
            server = [*prefect, "server", "start", "--host", HOST, "--port", str(prefect_port)]
            _start(services, "Prefect server", server, logs / "prefect-server.log", env, f"{api_url}/health")
        mlflow_url, uri = f"http://{HOST}:{mlflow_port}", tracking_uri(store)
        if uri.startswith("sqlite:") and not is_up(f"{mlflow_url}/health"):
            say(f"starting the MLflow page, log: {logs / 'mlflow.log'}")
            page = [sys.executable, "-m", *server_command(uri, port=mlflow_port)]
            page_env = {**env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            _start(services, "MLflow page", page, logs / "mlflow.log", page_env, f"{mlflow_url}/health")
        for command in (["work-pool", "create", POOL, "--type", "process", "--overwrite"], ["deploy", "--all"]):
            subprocess.run([*prefect, "--no-prompt", *command], env=env, check=True, stdout=subprocess.DEVNULL)
        say(f"Prefect: http://{HOST}:{prefect_port}")
        say(f"MLflow:  {comparison_url(store, port=mlflow_port) or mlflow_url}")
        say(f"build:   PREFECT_API_URL={api_url} prefect deployment run specbundle/build -p 'only=[\"demo\"]' --watch")
        worker = [*prefect, "worker", "start", "--pool", POOL, "--type", "process"]
        with SupervisedProcess("worker", worker, log=logs / "worker.log", env=env, on_line=say) as process:
            process.wait()
    return 0


def is_up(url: str) -> bool:
    """Whether a service answers there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _start(services: ExitStack, name: str, command: list[str], log: Path, env: dict[str, str], health_url: str) -> None:
    process = services.enter_context(SupervisedProcess(name, command, log=log, env=env))
    process.wait_ready(lambda: is_up(health_url), timeout_s=STARTUP_TIMEOUT_S)
