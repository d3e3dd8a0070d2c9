"""What `specbundle up` says before it starts anything, and of what it starts. The real thing: test_deployment.py."""

import os
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from threading import Thread
from typing import Any

import pytest

from flows import up
from specforge_core import cli
from specforge_core.process import ProcessError
from tests.factory import make_factory


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return make_factory(tmp_path)


@pytest.fixture
def taken_port() -> Iterator[int]:
    """Of a server that has no page."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


@pytest.mark.parametrize("option", ["--prefect-port", "--mlflow-port"])
def test_a_port_that_something_else_uses_is_refused_before_anything_starts(
    manifest: Path, taken_port: int, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--manifest", str(manifest), "up", option, str(taken_port)]) == 2
    printed = capsys.readouterr()
    assert f"port {taken_port} of 127.0.0.1: Address already in use; choose another with {option}" in printed.err
    assert "starting" not in printed.out


def test_a_tracker_that_cannot_be_opened_is_said_before_anything_starts(
    manifest: Path, tmp_path: Path, free_ports: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/mlflow.db").write_bytes(b"no database" * 1000)
    options = [f"--{name}-port={port}" for name, port in zip(("prefect", "mlflow"), free_ports, strict=True)]
    assert cli.main(["--manifest", str(manifest), "--store", str(tmp_path / "store"), "up", *options]) == 2
    printed = capsys.readouterr()
    assert f"MLflow cannot open {tmp_path / 'store/mlflow.db'}" in printed.err
    assert "starting" not in printed.out


def test_a_port_of_something_that_speaks_no_http_is_refused_too(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Greeter(BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"SSH-2.0-made-up\r\n")

    with TCPServer(("127.0.0.1", 0), Greeter) as server:
        Thread(target=server.serve_forever).start()
        port = str(server.server_address[1])
        status = cli.main(["--manifest", str(manifest), "up", "--prefect-port", port])
        server.shutdown()
    assert status == 2
    assert f"port {port} of 127.0.0.1: Address already in use" in capsys.readouterr().err


def test_deployments_are_given_the_manifest_and_the_store_of_the_command(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def run_services(store: Path, parameters: dict[str, str], **ports: Any) -> int:
        given.append((store, parameters))
        return 0

    monkeypatch.setattr(up, "run_services", run_services)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["up"]) == 0
    assert cli.main(["--manifest", manifest.name, "--store", "here", "up"]) == 0
    assert given == [
        (tmp_path / ".specbundle", {"manifest": str(manifest)}),
        (tmp_path / "here", {"manifest": str(manifest), "store": str(tmp_path / "here")}),
    ]


def test_a_command_of_prefect_that_fails_is_raised_with_what_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ProcessError, match=r"prefect deploy --nonsense ended with status [12]; its last(.|\n)*nonsense"
    ):
        up.run_prefect(["deploy", "--nonsense"], os.environ | {"PREFECT_HOME": str(tmp_path)})
