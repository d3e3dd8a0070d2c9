"""Servers start, are watched, are started again, and end with their stage. Real processes and real HTTP throughout."""

import dataclasses
import json
import logging
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest

from specforge_core.artifacts import SERVERS_DIRECTORY, seal
from specforge_core.benchmark import server as server_module
from specforge_core.benchmark.server import (
    AttachedServer,
    Launch,
    ServerLost,
    ServerRecord,
    SupervisedServer,
    free_port,
    gpu_groups,
    is_healthy,
    running_servers,
    server_info,
)
from specforge_core.facts import Conversations
from tests.sglang_like import MODULE, Behaviour, read_journal

ROOT = Path(__file__).parents[2]


def make_launch(behaviour: Behaviour, **fields: Any) -> Launch:
    """A launch of the server of the tests, which needs a second at most."""
    launch = Launch(
        python=sys.executable,
        module=MODULE,
        options={"--model-path": "scripted", "--max-running-requests": 8},
        environment=dict([behaviour.variable()]),
        startup_timeout_s=20,
    )
    return dataclasses.replace(launch, **fields)


def serving(
    directory: Path, behaviour: Behaviour | None = None, *, num_servers: int = 1, **fields: Any
) -> AbstractContextManager[tuple[SupervisedServer, ...]]:
    launch = make_launch(behaviour or Behaviour(), **fields)
    return running_servers(launch, name="test", gpu_groups=[()] * num_servers, directory=directory)


def generate(url: str, input_ids: list[int], rid: str = "a") -> list[int]:
    """New tokens. Raises: OSError."""
    body = {"input_ids": input_ids, "rid": rid, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=20) as answer:
        token_ids: list[int] = json.load(answer)["output_ids"]
        return token_ids


def pid_of(url: str) -> int:
    pid: int = server_info(url)["pid"]
    return pid


def kill(url: str) -> None:
    """SIGKILL to the server, gone when this returns."""
    process = psutil.Process(pid_of(url))
    process.kill()
    psutil.wait_procs([process], timeout=10)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SupervisedServer]:
    with serving(tmp_path) as (started,):
        yield started


def test_a_server_is_ready_inside_the_block_and_gone_after_it(tmp_path: Path) -> None:
    with serving(tmp_path) as (server,):
        url, pid = server.url, pid_of(server.url)
        assert url.startswith("http://127.0.0.1:")
        assert generate(url, [1, 2, 3]) == generate(url, [1, 2, 3])
        assert server.ensure_alive() == url
    assert not psutil.pid_exists(pid)
    assert not is_healthy(url, timeout_s=1)


def test_log_and_record_are_kept_and_are_no_content_of_the_artifact(tmp_path: Path) -> None:
    with serving(tmp_path) as (server,):
        port = server.url.rpartition(":")[2]
    folder = tmp_path / SERVERS_DIRECTORY
    assert "ready to roll" in (folder / "test-0.log").read_text()
    record = ServerRecord.model_validate_json((folder / "test-0.json").read_text())
    assert (record.version, record.num_restarts) == ("0.5.14", 0)
    assert record.command is not None
    assert record.command.endswith(
        f"-m {MODULE} --model-path scripted --max-running-requests 8 --host 127.0.0.1 --port {port}"
    )
    facts = Conversations(
        num_conversations=0, num_tokens=0, num_loss_tokens=0, num_failed=0, num_cut_off=0, chat_template_sha256="x"
    )
    (tmp_path / "rows").write_text("content")
    assert set(seal(tmp_path, facts, stage="regenerate", key="k", inputs={}, elapsed_s=1).files) == {"rows"}
    assert (folder / "test-0.log").exists()


def test_replicas_have_ports_and_gpus_of_their_own(tmp_path: Path) -> None:
    launch = make_launch(Behaviour())
    with running_servers(launch, name="test", gpu_groups=[("4", "5"), ("6", "7")], directory=tmp_path) as servers:
        assert len({server.url for server in servers}) == 2
        seen = [psutil.Process(pid_of(server.url)).environ()["CUDA_VISIBLE_DEVICES"] for server in servers]
        assert seen == ["4,5", "6,7"]
        assert [server.record().gpus for server in servers] == [("4", "5"), ("6", "7")]


def test_when_one_replica_does_not_start_none_is_left(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    behaviour = Behaviour(journal=str(journal), num_faulty_starts=1, exit_at_start="out of memory")
    with pytest.raises(ServerLost, match="out of memory"), serving(tmp_path, behaviour, num_servers=2):
        raise AssertionError("the block must not be entered")
    starts = [line["pid"] for line in read_journal(journal) if line["event"] == "start"]
    assert len(starts) == 2
    assert not any(psutil.pid_exists(pid) for pid in starts)


def test_ports_are_given_out_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        ports = list(pool.map(lambda _: free_port(), range(200)))
    assert len(set(ports)) == 200
    # SGLang derives another port from it by adding this, and does not start if there is none.
    assert max(ports) + 10_000 < 2**16


def test_a_server_that_dies_at_its_start_is_told_with_its_last_lines_and_its_log(tmp_path: Path) -> None:
    log = re.escape(str(tmp_path / SERVERS_DIRECTORY / "test-0.log"))
    with (
        pytest.raises(ServerLost, match=rf"server test-0 ended with status 1(.|\n)*no such weights(.|\n)*log: {log}"),
        serving(tmp_path, Behaviour(exit_at_start="no such weights")),
    ):
        raise AssertionError("the block must not be entered")


def test_a_server_that_hangs_at_its_start_is_ended_at_the_deadline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "SAY_EVERY_S", 0.5)
    behaviour = Behaviour(journal=str(tmp_path / "journal"), hang_at_start=True)
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(ServerLost, match=r"not ready after 2 s(.|\n)*loading weights(.|\n)*test-0\.log"),
        serving(tmp_path, behaviour, startup_timeout_s=2.0),
    ):
        raise AssertionError("the block must not be entered")
    # What it waits for was said meanwhile, with the server's latest words.
    assert re.search(r"server test-0 starts since [12] s \(limit 2 s\): .*loading weights", caplog.text)
    (start,) = read_journal(tmp_path / "journal")
    assert not psutil.pid_exists(start["pid"])


def test_an_unknown_flag_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="does not know --max-running-requests"),
        serving(tmp_path, Behaviour(lacks=("--max-running-requests",))),
    ):
        raise AssertionError("the block must not be entered")


def test_a_dead_server_has_a_successor_that_gives_the_same_answers(tmp_path: Path) -> None:
    with serving(tmp_path) as (server,):
        url, answer = server.url, generate(server.url, [1, 2, 3])
        kill(url)
        with pytest.raises(OSError, match=r"refused|reset"):
            generate(url, [1, 2, 3])
        successor = server.ensure_alive()
        assert successor == server.url != url
        assert generate(successor, [1, 2, 3]) == answer
    folder = tmp_path / SERVERS_DIRECTORY
    assert ServerRecord.model_validate_json((folder / "test-0.json").read_text()).num_restarts == 1
    assert (folder / "test-0.log").read_text().count("ready to roll") == 2


def test_many_clients_that_lost_one_server_share_one_restart(tmp_path: Path) -> None:
    with serving(tmp_path) as (server,):
        kill(server.url)
        with ThreadPoolExecutor(16) as pool:
            urls = list(pool.map(lambda _: server.ensure_alive(), range(16)))
        assert set(urls) == {server.url}
        assert server.record().num_restarts == 1


def test_a_server_that_dies_under_a_request_can_be_asked_again(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    behaviour = Behaviour(journal=str(journal), die_after=2, num_faulty_starts=1)
    answered: list[str] = []
    with serving(tmp_path, behaviour) as (server,):
        for rid in "abcd":
            try:
                generate(server.url, [1, 2, 3], rid)
            except OSError:
                generate(server.ensure_alive(), [1, 2, 3], rid)
            answered.append(rid)
    assert [line["rid"] for line in read_journal(journal) if line["event"] == "answer"] == answered == list("abcd")


def test_a_deaf_server_is_ended_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEALTH_TIMEOUT_S", 0.5)
    behaviour = Behaviour(journal=str(tmp_path / "journal"), deaf_after=0, num_faulty_starts=1)
    with serving(tmp_path, behaviour) as (server,):
        pid = pid_of(server.url)
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"{server.url}/generate", json.dumps({"input_ids": [1]}).encode(), timeout=0.5)
        assert len(generate(server.ensure_alive(), [1, 2, 3])) > 0
        assert not psutil.pid_exists(pid)


def test_restarts_are_bounded(tmp_path: Path) -> None:
    with serving(tmp_path, max_restarts=2) as (server,):
        for _ in range(2):
            kill(server.url)
            server.ensure_alive()
        kill(server.url)
        with pytest.raises(
            ServerLost, match=r"ready to roll(.|\n)*server test-0 is gone, 2 of 2 restarts used: .*test-0\.log\)$"
        ):
            server.ensure_alive()


def test_a_restart_that_fails_counts_too(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    behaviour = Behaviour(journal=str(journal), num_good_starts=1, exit_at_start="no memory")
    with serving(tmp_path, behaviour, max_restarts=3) as (server,):
        kill(server.url)
        with pytest.raises(ServerLost, match=r"\nserver test-0 is gone, 3 of 3 restarts used: .*no memory \(its log: "):
            server.ensure_alive()
    assert len([line for line in read_journal(journal) if line["event"] == "start"]) == 4


def test_leaving_the_block_cuts_a_restart_short(tmp_path: Path) -> None:
    behaviour = Behaviour(journal=str(tmp_path / "journal"), num_good_starts=1, hang_at_start=True)
    outcome: list[BaseException] = []

    def restart(server: SupervisedServer) -> None:
        try:
            server.ensure_alive()
        except ServerLost as error:
            outcome.append(error)

    with serving(tmp_path, behaviour, startup_timeout_s=60.0) as (server,):
        kill(server.url)
        thread = threading.Thread(target=restart, args=(server,))
        thread.start()
        time.sleep(0.5)
        left_at = time.monotonic()
    thread.join(5)
    assert not thread.is_alive()
    assert time.monotonic() - left_at < 10
    assert len(outcome) == 1


def test_an_error_in_the_stage_ends_the_server(tmp_path: Path) -> None:
    def run_stage() -> None:
        with serving(tmp_path) as (server,):
            pids.append(pid_of(server.url))
            raise KeyboardInterrupt

    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run_stage()
    assert not psutil.pid_exists(pids[0])


def test_no_server_outlives_a_stage_that_is_killed(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import pathlib, sys, time
        from specforge_core.benchmark.server import Launch, running_servers
        launch = Launch(python=sys.executable, module={MODULE!r}, options={{"--model-path": "scripted"}})
        with running_servers(launch, name="test", gpu_groups=[()], directory=pathlib.Path({str(tmp_path)!r})) as _:
            time.sleep(60)
    """)
    stage = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    record = tmp_path / SERVERS_DIRECTORY / "test-0.json"
    deadline = time.monotonic() + 20
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    family = psutil.Process(stage.pid).children(recursive=True)
    # The supervisor and the server.
    assert len(family) == 2
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_an_attached_server_is_used_and_left_running(server: SupervisedServer) -> None:
    attached = AttachedServer(f"{server.url}/")
    assert attached.ensure_alive() == attached.url == server.url
    assert attached.record() == ServerRecord(version="0.5.14")
    assert is_healthy(server.url, timeout_s=5)


def test_an_attached_server_that_is_gone_is_waited_for_and_then_reported() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    started_at = time.monotonic()
    with pytest.raises(ServerLost, match=f"no server answered at {url}/health for 1 s"):
        AttachedServer(url, timeout_s=1.0).ensure_alive()
    assert 1.0 <= time.monotonic() - started_at < 5


def test_a_proxy_of_the_environment_is_not_asked_for_the_loopback(
    server: SupervisedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert is_healthy(server.url, timeout_s=5)


def test_gpus_are_dealt_to_servers_in_order(caplog: pytest.LogCaptureFixture) -> None:
    assert gpu_groups((), 2) == ((),)
    assert gpu_groups(("0", "1", "2", "3"), 2) == (("0", "1"), ("2", "3"))
    assert gpu_groups(("3",), 1) == (("3",),)
    assert caplog.text == ""
    assert gpu_groups(("0", "1", "2"), 2) == (("0", "1"),)
    assert "1 of 3 GPUs stay idle" in caplog.text
    with pytest.raises(ValueError, match="tensor_parallel=4 needs as many GPUs, but this stage has 2"):
        gpu_groups(("0", "1"), 4)
