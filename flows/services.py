"""Servers that a build uses: Prefect's API, the MLflow page. Supervised, so that none outlives its starter."""

import atexit
import http.client
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_URL

from specforge_core.process import SupervisedProcess

HOST = "127.0.0.1"
PREFECT = [sys.executable, "-m", "prefect"]
STARTUP_TIMEOUT_S = 180.0


class Service:
    """A server that is starting, or was up before."""

    def __init__(
        self, name: str, command: Sequence[str], *, health_url: str, log: Path, env: Mapping[str, str]
    ) -> None:
        self.name, self._health_url = name, health_url
        self._process = None if is_up(health_url) else SupervisedProcess(name, command, log=log, env=env)

    def __enter__(self) -> "Service":
        if self._process:
            self._process.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process:
            self._process.__exit__(None, None, None)

    def wait_ready(self) -> None:
        """Return when it answers. Raises: ProcessError or TimeoutError, with its last lines."""
        if self._process:
            self._process.wait_ready(lambda: is_up(self._health_url), timeout_s=STARTUP_TIMEOUT_S)


def is_up(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError):
        return False


def prefect_server(port: int, *, log: Path, env: Mapping[str, str], options: Sequence[str] = ()) -> Service:
    """A Prefect server on this port of this host."""
    command = [*PREFECT, "server", "start", "--host", HOST, "--port", str(port), *options]
    return Service("Prefect server", command, health_url=f"{api_url(port)}/health", log=log, env=env)


def api_url(port: int) -> str:
    """Where a Prefect server on this port of this host is spoken to."""
    return f"http://{HOST}:{port}/api"


def start_own_prefect_server(log: Path) -> bool:
    """Start a Prefect server for this process; False if PREFECT_API_URL (or a profile) names one, which is used then.

    Prefect would start one by itself. But that one dies with the first Ctrl-C, before a run can say how it ended,
    and outlives a starter that is killed.
    """
    if PREFECT_API_URL.value():
        return False
    port = _free_port()
    server = prefect_server(port, log=log, env=os.environ, options=["--no-ui"]).__enter__()
    # As the interpreter exits, Prefect hands in its last log lines, and only then this runs.
    atexit.register(server.__exit__)
    # The environment, because settings in a context do not reach the threads that read a stage's lines.
    os.environ["PREFECT_API_URL"] = api_url(port)
    refresh_global_settings_context()
    # Loading the flows takes as long as the server's start, so both go on at once.
    import flows.specbundle  # noqa: F401

    server.wait_ready()
    return True


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])
