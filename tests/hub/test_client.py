"""Calls of the Hub: what is tried again, how an error reads, and that the token stays inside."""

import logging
import pickle
import traceback
from pathlib import Path

import pytest
from huggingface_hub import get_session

from specforge_core.hub import client
from specforge_core.hub.access import check_write_access
from specforge_core.hub.client import Hub
from specforge_core.hub.upload import Repository, upload_folder
from specforge_core.process import ending
from tests.hub_like import server
from tests.hub_like.api import Account
from tests.hub_like.injection import FOREVER, Fault
from tests.hub_like.server import TOKEN

REPOSITORY = Repository("specbundle/demo")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


class Clock:
    """Stands in for the event that interrupts a wait: it writes down how long was waited, and does not wait."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return False


def whoami_fails(hub_server: server.Hub, times: int, status: int | None = 503) -> Fault:
    return hub_server.faults.add(Fault("GET /api/whoami-v2", status=status, times=times))


def test_waits_double_and_end(hub_server: server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(client, "ending", clock)
    hub = Hub(hub_server.url, TOKEN)
    whoami_fails(hub_server, 3)
    assert hub.call("asking", hub.api.whoami)["name"] == "tester"
    assert clock.waits == [1, 2, 4]
    fault = whoami_fails(hub_server, FOREVER)
    with pytest.raises(
        ConnectionError, match=r"^asking: the Hub at .* answered 503 .*; gave up after 7 tries; try again"
    ):
        hub.call("asking", hub.api.whoami)
    assert clock.waits[3:] == [1, 2, 4, 8, 16, 32]
    assert fault.num_hits == 7


def test_a_hub_that_says_how_long_is_believed_within_limits(
    hub_server: server.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(client, "ending", clock)
    hub = Hub(hub_server.url, TOKEN)
    for seconds in ("20", "86400"):
        hub_server.faults.add(Fault("GET /api/whoami-v2", status=429, headers={"Retry-After": seconds}))
    hub.call("asking", hub.api.whoami)
    assert clock.waits == [20, client.MAX_DELAY_S]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "answered 401 .*; the token is not accepted: renew HF_TOKEN"),
        (403, "answered 403 .*; the token may not do this: use one with the right to write"),
        (404, r"answered 404 \(.*made to fail"),
    ],
)
def test_a_refusal_is_not_tried_again(hub: Hub, hub_server: server.Hub, status: int, message: str) -> None:
    fault = whoami_fails(hub_server, FOREVER, status)
    with pytest.raises(ValueError, match=message):
        hub.call("asking", hub.api.whoami)
    assert fault.num_hits == 1


def test_a_hub_that_is_not_there_is_a_connection_error() -> None:
    # Port 9 is "discard": nothing listens there.
    hub = Hub("http://127.0.0.1:9", TOKEN, delays_s=(0.01,))
    with pytest.raises(ConnectionError, match=r"did not answer \(ConnectError .*\); gave up after 2 tries"):
        hub.call("asking", hub.api.whoami)


def test_a_wait_ends_when_the_build_does(hub_server: server.Hub) -> None:
    whoami_fails(hub_server, FOREVER)
    hub = Hub(hub_server.url, TOKEN, delays_s=(3600.0,))
    ending.set()
    with pytest.raises(InterruptedError, match="stopped while asking"):
        hub.call("asking", hub.api.whoami)


def test_what_is_wrong_here_is_not_tried_again(hub: Hub) -> None:
    calls = []

    def broken() -> None:
        calls.append(1)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        hub.call("asking", broken)
    assert len(calls) == 1


def test_no_connection_stays_silent_for_ever(hub: Hub) -> None:
    assert get_session().timeout.read == client.TIMEOUT_S


def test_a_fine_grained_token_without_a_word_of_writing_is_warned_of(
    hub: Hub, hub_server: server.Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub_server.accounts = {TOKEN: Account(role="fineGrained")}
    check_write_access(hub, REPOSITORY)
    assert "the fine-grained token of tester names no permission to write model specbundle/demo" in caplog.text


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST .*/commit/", status=500, message=lambda authorization: f"bad {authorization}", times=FOREVER),
        Fault("POST .*/commit/", status=403, message=lambda authorization: f"{authorization} may not"),
        Fault("POST .*/commit/", times=FOREVER),
        Fault("PUT /_lfs/", status=400, message=lambda authorization: f"refused: {authorization} {TOKEN}"),
        Fault("POST .*/tag/", status=422, message=lambda authorization: authorization),
        Fault("GET .*/resolve/", status=403, message=lambda authorization: authorization),
    ],
    ids=lambda fault: f"{fault.request} {fault.status}",
)
def test_no_error_and_no_log_holds_the_token_even_if_the_hub_sends_it_back(
    hub: Hub, hub_server: server.Hub, folder: Path, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    hub_server.faults.add(fault)
    # Not httpcore's wire trace, which has every header of an answer and is off unless someone asks for it.
    caplog.set_level(logging.INFO)
    for name in ("specforge_core", "huggingface_hub"):
        caplog.set_level(logging.DEBUG, name)
    with pytest.raises((ValueError, ConnectionError)) as caught:
        upload_folder(hub, folder, REPOSITORY)
    error: BaseException | None = caught.value
    assert fault.num_hits > 0
    assert TOKEN not in "".join(traceback.format_exception(error))
    assert TOKEN.encode() not in pickle.dumps(error)
    while error:
        # One of the client's would carry its request, with the header.
        assert type(error) in (ValueError, ConnectionError)
        assert TOKEN not in repr(vars(error)) + repr(error.args)
        error = error.__cause__ or error.__context__
    assert TOKEN not in caplog.text
    assert TOKEN not in repr(hub)
