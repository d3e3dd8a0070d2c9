"""The life of SGLang servers: started or attached to, ready, watched, started again, and ended with their stage.

A server is another process, with an interpreter and packages of its own, reached over HTTP. Torch-free.

    with running_servers(launch, name="baseline", gpu_groups=gpu_groups(gpus, 2), directory=out) as servers:
        url = servers[0].url
        ...                                  # a request fails
        url = servers[0].ensure_alive()      # the same server, or its successor at another address: send it again
"""

import contextlib
import http.client
import json
import logging
import random
import shlex
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from specforge_core.artifacts import SERVERS_DIRECTORY, write_atomically
from specforge_core.benchmark.server_flags import Options, ServerFlags, known_flags, resolve_flags
from specforge_core.facts import ServerRecord
from specforge_core.process import ProcessError, SupervisedProcess

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
SGLANG_MODULE = "sglang.launch_server"
PROBE_TIMEOUT_S = 5.0
# SGLang answers `/health` by generating a token, and gives up on that itself after 20 s.
HEALTH_TIMEOUT_S = 30.0
ATTACH_TIMEOUT_S = 60.0
POLL_S = 0.5
SAY_EVERY_S = 15.0


class ServerLost(RuntimeError):
    """There is no server, and there will be none. The message has the log's last lines and its name, the last line all
    that fits into one."""


@dataclass(frozen=True)
class Launch:
    """How servers are started."""

    python: str
    """Interpreter of the environment that has SGLang."""
    options: Options
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables on top of this process's own."""
    module: str = SGLANG_MODULE
    startup_timeout_s: float = 900.0
    max_restarts: int = 3
    """Of each server, over its life."""

    def program(self, gpus: Sequence[str] = ()) -> tuple[str, ...]:
        """The command line before the flags, of a server that sees these GPUs, or all if none are named."""
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        variables = {"PYTHONUNBUFFERED": "1", **visible, **self.environment}
        assignments = [f"{name}={value}" for name, value in variables.items()]
        return ("env", *assignments, self.python, "-m", self.module)


class Server(Protocol):
    """A server that a client talks to."""

    @property
    def url(self) -> str:
        """`http://host:port`; another one after a restart."""
        ...

    def ensure_alive(self) -> str:
        """The URL of a server that answers; for a client whose request failed, before it sends it again.

        It may take as long as a start does. Any number of threads may call it at once: one start serves them all.
        Raises: ServerLost.
        """
        ...


class AttachedServer:
    """A server that somebody else keeps running."""

    def __init__(self, url: str, *, timeout_s: float = ATTACH_TIMEOUT_S) -> None:
        """Args: timeout_s: how long `ensure_alive` waits for it, also when it is being restarted."""
        self.url, self._timeout_s = url.rstrip("/"), timeout_s

    def ensure_alive(self) -> str:
        """See `Server`."""
        deadline = time.monotonic() + self._timeout_s
        while not is_healthy(self.url, timeout_s=min(HEALTH_TIMEOUT_S, self._timeout_s)):
            if time.monotonic() > deadline:
                raise ServerLost(
                    f"no server answered at {self.url}/health for {self._timeout_s:g} s: start it again, or let the "
                    "stage start its own"
                )
            time.sleep(POLL_S)
        return self.url

    def record(self) -> ServerRecord:
        """What serves. Raises: ValueError if it is no SGLang server."""
        return ServerRecord(version=server_info(self.url)["version"])


class SupervisedServer:
    """A server of this process's own, as a context manager: leaving the block ends it."""

    def __init__(self, name: str, launch: Launch, flags: ServerFlags, *, log: Path, gpus: Sequence[str]) -> None:
        """Args: name: for messages; log: file that the output of all its starts is appended to; gpus: those that it
        sees, all of them if none are named."""
        self._name, self._launch, self._flags = name, launch, flags
        self._log, self._gpus = log, tuple(gpus)
        self._lock = threading.Lock()
        self._num_restarts = 0
        self._is_over = False

    def __enter__(self) -> "SupervisedServer":
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        # Another thread may hold the lock for as long as a restart takes: this cuts it short.
        self._is_over = True
        self._process.stop()
        with self._lock:
            self._running.close()

    @property
    def url(self) -> str:
        """See `Server`."""
        return self._url

    def ensure_alive(self) -> str:
        """See `Server`. One that runs but is deaf is ended first. Raises: ServerLost after the last restart."""
        with self._lock:
            if self._process.is_running and is_healthy(self._url, timeout_s=HEALTH_TIMEOUT_S):
                return self._url
            # The log is whole only after the end of the process.
            self._running.close()
            lost = self._lost(f"{self._name} is gone")
            while self._num_restarts < self._launch.max_restarts and not self._is_over:
                self._num_restarts += 1
                logger.warning("%s\nrestart %d of %d", lost, self._num_restarts, self._launch.max_restarts)
                try:
                    self._start()
                except ServerLost as error:
                    lost = error
                else:
                    return self._url
            raise self._lost(
                f"{self._name} is gone, {self._num_restarts} of {self._launch.max_restarts} restarts used"
            ) from lost

    def record(self) -> ServerRecord:
        """What serves."""
        return ServerRecord(
            version=self._version,
            command=shlex.join(self._process.command),
            gpus=self._gpus,
            dropped_flags=self._flags.dropped,
            num_restarts=self._num_restarts,
        )

    def _start(self) -> None:
        """Return when the server is ready. Raises: ServerLost if it ends before, or is not ready in time."""
        # A new port each time: a successor must not be taken for the server that a late request was meant for.
        port = free_port()
        self._url = f"http://{LOOPBACK}:{port}"
        address = ("--host", LOOPBACK, "--port", str(port))
        command = [*self._launch.program(self._gpus), *self._flags.words, *address]
        logger.info("starting %s (log: %s)", self._name, self._log)
        started_at = time.monotonic()
        with contextlib.ExitStack() as running:
            self._process = running.enter_context(SupervisedProcess(self._name, command, log=self._log))
            if self._is_over:
                self._process.stop()
            try:
                self._process.wait_ready(self._probe(started_at), self._launch.startup_timeout_s)
                self._version: str = server_info(self._url)["version"]
            except (ProcessError, OSError) as error:
                raise self._lost(str(error).splitlines()[0].removesuffix("; its last lines:")) from error
            self._running = running.pop_all()
        logger.info("%s is ready at %s after %.0f s", self._name, self._url, time.monotonic() - started_at)

    def _lost(self, what: str) -> ServerLost:
        """The error, its last line the one to show where there is room for one."""
        lines = [line for line in self._process.last_lines if line.strip()] or ["it printed nothing"]
        return ServerLost(
            "\n".join([f"{what}; its last lines:", *lines, f"{what}: {lines[-1]} (its log: {self._log})"])
        )

    def _probe(self, started_at: float) -> Callable[[], bool]:
        """Whether the server is ready; says now and then that it is not."""
        said_at = started_at

        def is_ready() -> bool:
            nonlocal said_at
            if is_healthy(self._url, timeout_s=PROBE_TIMEOUT_S):
                return True
            if (now := time.monotonic()) - said_at > SAY_EVERY_S:
                said_at = now
                line = self._process.last_lines[-1] if self._process.last_lines else "it printed nothing yet"
                limit_s = self._launch.startup_timeout_s
                logger.info("%s starts since %.0f s (limit %.0f s): %s", self._name, now - started_at, limit_s, line)
            return False

        return is_ready


@contextlib.contextmanager
def running_servers(
    launch: Launch, *, name: str, gpu_groups: Sequence[Sequence[str]], directory: Path
) -> Iterator[tuple[SupervisedServer, ...]]:
    """Ready servers with the same options, one for each group of GPUs; all of them end with the block.

    Their logs and records lie in the artifact's own folder for that and are no part of its content.

    Args: name: what they serve, different for each call of a stage; directory: the stage's.
    Raises: ValueError for options that the server does not know, ServerLost if one does not start.
    """
    flags = resolve_flags(launch.options, known_flags(launch.program()))
    folder = directory / SERVERS_DIRECTORY
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{name}-{i}" for i in range(len(gpu_groups))]
    servers = [
        SupervisedServer(f"server {name}", launch, flags, log=folder / f"{name}.log", gpus=gpus)
        for name, gpus in zip(names, gpu_groups, strict=True)
    ]
    with contextlib.ExitStack() as stack:
        # Each start takes a minute, most of it imports: all at once.
        with ThreadPoolExecutor(len(servers)) as pool:
            starts = [pool.submit(server.__enter__) for server in servers]
        for server, start in zip(servers, starts, strict=True):
            if start.exception() is None:
                stack.push(server)
        for start in starts:
            start.result()
        _write_records(servers, names, folder)
        # Once more at the end, however it ends: then with the restarts.
        stack.callback(_write_records, servers, names, folder)
        yield tuple(servers)


def _write_records(servers: Sequence[SupervisedServer], names: Sequence[str], folder: Path) -> None:
    for server, name in zip(servers, names, strict=True):
        write_atomically(folder / f"{name}.json", server.record().model_dump_json(indent=1) + "\n")


def gpu_groups(gpus: Sequence[str], tensor_parallel: int) -> tuple[tuple[str, ...], ...]:
    """The GPUs of each server; one group of none on a host without GPUs.

    Raises: ValueError if there are fewer GPUs than one server needs.
    """
    if not gpus:
        return ((),)
    if len(gpus) < tensor_parallel:
        raise ValueError(
            f"tensor_parallel={tensor_parallel} needs as many GPUs, but this stage has {len(gpus)}: lower it, or raise "
            "resources.num_gpus"
        )
    num_servers, num_idle = divmod(len(gpus), tensor_parallel)
    if num_idle:
        logger.warning("%d of %d GPUs stay idle beside servers of %d each", num_idle, len(gpus), tensor_parallel)
    return tuple(tuple(gpus[i * tensor_parallel : (i + 1) * tensor_parallel]) for i in range(num_servers))


# Below those that Linux gives to outgoing connections: one of them could take the port while the server starts.
SERVER_PORTS = range(20_000, 32_768)
GRPC_PORT_OFFSET = 10_000
"""SGLang 0.5.14 refuses to start if its port and this make more than 65,535."""
_given_ports: set[int] = set()
_ports_lock = threading.Lock()


def free_port() -> int:
    """A port of the loopback interface that is free, as is the one for gRPC that SGLang derives from it.

    This process has not given it out before. Raises: OSError if there is none.
    """
    with _ports_lock:
        for port in random.sample(SERVER_PORTS, len(SERVER_PORTS)):
            # The system may offer a port again before the server that it was meant for has taken it.
            if port not in _given_ports and all(map(_is_free, (port, port + GRPC_PORT_OFFSET))):
                _given_ports.add(port)
                return port
    raise OSError(f"no port from {SERVER_PORTS[0]} to {SERVER_PORTS[-1]} is free for a server")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def http_request(url: str, timeout_s: float, *, method: str = "GET") -> bytes:
    """The body of an answer with status 200. Never through a proxy. Raises: OSError, of which HTTPError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, method=method), timeout=timeout_s) as answer:
            body: bytes = answer.read()
            return body
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: {error!r}") from error


def is_healthy(url: str, *, timeout_s: float) -> bool:
    """Whether the server at `url` says that it can generate."""
    try:
        http_request(f"{url}/health", timeout_s)
    except OSError:
        return False
    return True


def server_info(url: str) -> dict[str, Any]:
    """Arguments, `version` and `internal_states` of a server. Raises: ValueError if it is no SGLang server, OSError."""
    # The second one is its name in older versions.
    for path in ("server_info", "get_server_info"):
        try:
            info: dict[str, Any] = json.loads(http_request(f"{url}/{path}", HEALTH_TIMEOUT_S))
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.NOT_FOUND:
                raise
        else:
            return info
    raise ValueError(f"{url} has no /server_info: it is no SGLang server")
