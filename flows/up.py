"""Everything that a deployment needs, in one terminal: Prefect server, work pool, deployment, MLflow page, worker."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from specforge_core.process import SupervisedProcess
from tasks.tracking import comparison_url, server_command, tracking_uri

POOL = "specbundle"
STARTUP_TIMEOUT_S = 180.0
HOST = "127.0.0.1"


def run_services(store: Path, *, prefect_port: int, mlflow_port: int) -> int:
    """Run until Ctrl-C, or until the worker ends; then stop what was started here. A server that answers is used as is.

    Raises: ProcessError or TimeoutError for a service that does not start, with its last lines.
    """
    api_url = f"http://{HOST}:{prefect_port}/api"
    mlflow_url, uri = f"http://{HOST}:{mlflow_port}", tracking_uri(store)
    # The server needs its own URL too: with another port than 4200 its pages otherwise ask the wrong one.
    env = {**os.environ, "PREFECT_API_URL": api_url, "PREFECT_LOGGING_EXTRA_LOGGERS": "specforge_core"}
    prefect = [sys.executable, "-m", "prefect"]
    with ExitStack() as stack:
        services = [
            _start(
                stack,
                "Prefect server",
                [*prefect, "server", "start", "--host", HOST, "--port", str(prefect_port)],
                log=store / "logs" / "prefect-server.log",
                env=env,
                health_url=f"{api_url}/health",
            )
        ]
        if uri.startswith("sqlite:"):
            services.append(
                _start(
                    stack,
                    "MLflow page",
                    [sys.executable, "-m", *server_command(uri, port=mlflow_port)],
                    log=store / "logs" / "mlflow.log",
                    # Of its background workers nothing here makes use.
                    env={**env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                    health_url=f"{mlflow_url}/health",
                )
            )
        for service in services:
            service.wait()
        for command in (["work-pool", "create", POOL, "--type", "process", "--overwrite"], ["deploy", "--all"]):
            subprocess.run([*prefect, "--no-prompt", *command], env=env, check=True, stdout=subprocess.DEVNULL)
        say(f"Prefect: http://{HOST}:{prefect_port}")
        say(f"MLflow:  {comparison_url(store, port=mlflow_port) or mlflow_url}")
        say(f"build:   PREFECT_API_URL={api_url} prefect deployment run specbundle/build -p 'only=[\"demo\"]' --watch")
        worker = [*prefect, "worker", "start", "--pool", POOL, "--type", "process"]
        with SupervisedProcess("worker", worker, log=store / "logs" / "worker.log", env=env, on_line=say) as process:
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


class Service(NamedTuple):
    """Something that answers at a URL once it is up."""

    health_url: str
    process: SupervisedProcess | None
    """None if it was up before."""

    def wait(self) -> None:
        """Return when it answers. Raises: ProcessError or TimeoutError, with its last lines."""
        if self.process:
            self.process.wait_ready(lambda: is_up(self.health_url), timeout_s=STARTUP_TIMEOUT_S)


def _start(
    stack: ExitStack, name: str, command: list[str], *, log: Path, env: dict[str, str], health_url: str
) -> Service:
    if is_up(health_url):
        say(f"{name}: is up already")
        return Service(health_url, None)
    say(f"{name}: starting, its log is {log}")
    return Service(health_url, stack.enter_context(SupervisedProcess(name, command, log=log, env=env)))
