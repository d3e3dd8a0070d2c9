"""The HTTP side of the local Hub: it reads requests, asks `api.HubApi`, and breaks what a fault says."""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.hub_like.api import Account, Answer, HubApi, Request
from tests.hub_like.injection import Fault, Faults
from tests.hub_like.storage import Storage

TOKEN = "hf_of_the_local_hub"


class Hub(ThreadingHTTPServer):
    """A Hub on a loopback port."""

    def __init__(self, root: Path, *, port: int = 0, accounts: Mapping[str, Account] | None = None) -> None:
        """Args: root: folder of everything that it holds; accounts: by token."""
        super().__init__(("127.0.0.1", port), Handler)
        self.storage = Storage(root)
        self.api = HubApi(self.storage)
        self.accounts = {TOKEN: Account()} if accounts is None else accounts
        self.faults = Faults()
        self.calls: list[str] = []
        """`METHOD /path` of every request, in the order in which they came."""
        self.lock = threading.RLock()
        self.is_closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that hangs up, or is killed, is no failure of the server.
        pass


@contextlib.contextmanager
def running(root: Path, **kwargs: object) -> Iterator[Hub]:
    """A Hub in a thread of this process. Arguments as of `Hub`."""
    hub = Hub(root, **kwargs)  # type: ignore[arg-type]
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.is_closing.set()
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    # Head and body of an answer in one packet: apart, each answer waits 40 ms for the client's acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: Hub

    def answer(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), dict(parse_qsl(address.query))
        call = f"{self.command} {path}"
        self.server.calls.append(call)
        fault = self.server.faults.hit(call)
        if fault and fault.when == "before":
            fault.on_hit()
            fault = None if fault.passes else fault
        body = self.read_body(fault.body_fraction if fault else 1.0)
        if body is None:
            return self.hang_up()
        if fault and fault.when == "before" and not fault.change:
            return self.break_off(fault)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        account = self.server.accounts.get(token)
        method = "GET" if self.command == "HEAD" else self.command
        with self.server.lock:
            answer = self.server.api.answer(Request(method, path, body, account, query, self.server.url))
        if fault is None:
            return self.send(answer)
        if fault.change:
            return self.send(answer._replace(body=fault.change(answer.body)))
        fault.on_hit()
        return self.break_off(fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def read_body(self, fraction: float) -> bytes | None:
        """The request's body; None if only that fraction of it is to be read, or its client is gone before its end."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            return self.read_chunks()
        num_bytes = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(int(num_bytes * fraction))
        return body if fraction == 1 and len(body) == num_bytes else None

    def read_chunks(self) -> bytes:
        body = b""
        while num_bytes := int(self.rfile.readline(), 16):
            body += self.rfile.read(num_bytes)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def break_off(self, fault: Fault) -> None:
        """What the client sees instead of its answer."""
        self.server.is_closing.wait(fault.silence_s)
        if fault.status is None:
            return self.hang_up()
        message = fault.message(self.headers.get("Authorization") or "")
        return self.send(Answer(fault.status, {"error": message}, {"X-Error-Message": message, **fault.headers}))

    def hang_up(self) -> None:
        self.close_connection = True

    def send(self, answer: Answer) -> None:
        body = answer.body
        if not isinstance(body, bytes):
            body = b"" if body is None else json.dumps(body).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        is_text = self.command == "GET" and "/resolve/" not in self.path and isinstance(answer.body, bytes)
        kind = "text/plain; charset=utf-8" if is_text else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
