"""A real MLflow server, as users start it: for tests over HTTP, and for a picture of its page."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.services import HOST, is_up
from specforge_core.benchmark.server import free_port
from specforge_core.process import SupervisedProcess
from tasks.tracking import server_command

STARTUP_TIMEOUT_S = 180.0


@contextmanager
def mlflow_page(uri: str, *, directory: Path) -> Iterator[int]:
    """The port of a server over that database. Args: directory: of its log, and of artifacts that it is sent."""
    port = free_port()
    command = [sys.executable, "-m", *server_command(uri, port=port)]
    command += ["--artifacts-destination", str(directory / "artifacts")]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with SupervisedProcess("MLflow page", command, log=directory / "mlflow.log", env=env) as process:
        process.wait_ready(lambda: is_up(f"http://{HOST}:{port}/health"), timeout_s=STARTUP_TIMEOUT_S)
        yield port
