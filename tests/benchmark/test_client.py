"""Every request is answered or refused, whatever its server does meanwhile. Real processes and real HTTP throughout."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from specforge_core.benchmark import client as client_module
from specforge_core.benchmark.client import (
    MAX_ATTEMPTS,
    Client,
    Job,
    Reply,
    RequestFailed,
    RequestRefused,
    completed,
    sampling_params,
)
from specforge_core.benchmark.server import (
    AttachedServer,
    Launch,
    Server,
    ServerLost,
    SupervisedServer,
    running_servers,
    server_info,
)
from specforge_core.targets import Sampling
from tests.sglang_like import MODULE, Behaviour, read_journal
from tests.sglang_like.answers import ScriptedAnswers

STARTUP_TIMEOUT_S = 20.0
GREEDY = {"temperature": 0.0, "max_new_tokens": 8}
EXPECTED = ScriptedAnswers("scripted", num_draft_steps=0)


@contextlib.contextmanager
def serving(
    directory: Path, behaviour: Behaviour | None = None, *, num_servers: int = 1, **fields: Any
) -> Iterator[tuple[SupervisedServer, ...]]:
    launch = Launch(
        python=sys.executable,
        module=MODULE,
        options={"--model-path": "scripted", "--max-running-requests": 64},
        environment=dict([(behaviour or Behaviour()).variable()]),
        startup_timeout_s=STARTUP_TIMEOUT_S,
        **fields,
    )
    with running_servers(launch, name="test", gpu_groups=[()] * num_servers, directory=directory) as servers:
        yield servers


def jobs(num_jobs: int, **more: Any) -> list[Job]:
    return [Job(f"r-{i}", [1, 2, i % 256, i // 256], {**GREEDY, **more}) for i in range(num_jobs)]


def check_answers(servers: tuple[Server, ...], asked: list[Job], *, max_in_flight: int = 16) -> list[Reply]:
    """Each job is answered once, by what its prompt asks for."""
    outcomes = list(completed(servers, iter(asked), max_in_flight=max_in_flight))
    assert sorted(outcome.job.rid for outcome in outcomes) == sorted(job.rid for job in asked)
    replies = []
    for job, result in outcomes:
        assert isinstance(result, Reply), result
        assert list(result.token_ids) == EXPECTED.answer("", job.input_ids, dict(job.sampling_params)).token_ids
        replies.append(result)
    return replies


def peak_running(server: Server) -> int:
    peak: int = server_info(server.url)["internal_states"][0]["peak_running"]
    return peak


def num_answers(journal: Path) -> dict[str, int]:
    """Answers by the name that the client gave the request, its number of the attempt left out."""
    names = [line["rid"].partition("#")[0] for line in read_journal(journal) if line["event"] == "answer"]
    return {name: names.count(name) for name in names}


def test_many_requests_are_in_flight_and_no_more_than_allowed(tmp_path: Path) -> None:
    with serving(tmp_path, Behaviour(step_delay_s=0.03)) as servers:
        check_answers(servers, jobs(120), max_in_flight=24)
        assert peak_running(servers[0]) == 24


def test_replicas_share_the_load(tmp_path: Path) -> None:
    with serving(tmp_path, Behaviour(step_delay_s=0.03), num_servers=3) as servers:
        check_answers(servers, jobs(120), max_in_flight=24)
        assert [peak_running(server) for server in servers] == [8, 8, 8]
        counts = [server_info(server.url)["internal_states"][0]["num_requests"] for server in servers]
        assert sum(counts) == 120
        assert min(counts) > 30


def test_requests_of_a_session_go_to_the_same_server_while_it_has_room(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def ask(servers: tuple[Server, ...]) -> None:
        async with Client(servers, max_in_flight=16) as client:
            for turn, order in enumerate([range(8), reversed(range(8)), range(8)]):
                asked = (client.generate(f"{i}/{turn}", [i, turn + 1], GREEDY, session=f"session {i}") for i in order)
                await asyncio.gather(*asked)

    with serving(tmp_path, Behaviour(journal=str(journal), step_delay_s=0.005), num_servers=2) as servers:
        asyncio.run(ask(servers))
    pids = {line["rid"]: line["pid"] for line in read_journal(journal) if line["event"] == "answer"}
    assert len(set(pids.values())) == 2
    assert all(pids[f"{i}/0"] == pids[f"{i}/1"] == pids[f"{i}/2"] for i in range(8))


def test_errors_aborts_and_lost_connections_are_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Six attempts at a request would all fail now and then.
    monkeypatch.setattr(client_module, "MAX_ATTEMPTS", 20)
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.001)
    journal = tmp_path / "journal"
    with serving(tmp_path, Behaviour(fail_every=7, drop_every=11, abort_every=13, journal=str(journal))) as servers:
        replies = check_answers(servers, jobs(60))
        assert servers[0].record().num_restarts == 0
    counts = num_answers(journal)
    assert len(counts) == 60
    assert set(counts.values()) == {1}
    # SGLang refuses a name that it still works on: another attempt has another one.
    assert {(reply.num_attempts, reply.meta["id"].partition("#")[2]) for reply in replies} >= {(1, ""), (2, "2")}
    assert all(reply.meta["id"].partition("#")[2] in ("", str(reply.num_attempts)) for reply in replies)


def test_a_request_that_fails_each_time_is_given_up_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.001)
    with serving(tmp_path, Behaviour(fail_every=1)) as servers:
        outcomes = list(completed(servers, iter(jobs(3)), max_in_flight=2))
        assert server_info(servers[0].url)["internal_states"][0]["num_requests"] == 3 * MAX_ATTEMPTS
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert isinstance(outcome.result, RequestFailed)
        assert f"{MAX_ATTEMPTS} attempts failed" in str(outcome.result)
        assert "injected failure" in str(outcome.result)


def test_a_refused_request_is_not_asked_again_and_stops_no_other(tmp_path: Path) -> None:
    too_long = Job("long", [1] * 5000, GREEDY)
    with serving(tmp_path) as servers:
        outcomes = {job.rid: result for job, result in completed(servers, iter([*jobs(3), too_long]), max_in_flight=4)}
        assert server_info(servers[0].url)["internal_states"][0]["num_requests"] == 4
    refused = outcomes.pop("long")
    assert isinstance(refused, RequestRefused)
    assert "status 400" in str(refused)
    assert "longer than the model's context length" in str(refused)
    assert all(isinstance(result, Reply) for result in outcomes.values())


def test_what_was_in_flight_when_a_server_died_is_asked_of_its_successor(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    behaviour = Behaviour(die_after=20, num_faulty_starts=1, step_delay_s=0.005, journal=str(journal))
    with serving(tmp_path, behaviour) as servers:
        check_answers(servers, jobs(60))
        # One death costs one restart, however many requests were in flight.
        assert servers[0].record().num_restarts == 1
    assert len(num_answers(journal)) == 60


def test_a_deaf_server_is_noticed_by_its_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENCE_S", 0.3)
    monkeypatch.setattr("specforge_core.benchmark.server.HEALTH_TIMEOUT_S", 1.0)
    behaviour = Behaviour(deaf_after=10, num_faulty_starts=1, journal=str(tmp_path / "journal"))
    with serving(tmp_path, behaviour) as servers:
        check_answers(servers, jobs(40))
        assert servers[0].record().num_restarts == 1


def test_a_slow_server_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENCE_S", 0.05)
    with serving(tmp_path, Behaviour(step_delay_s=0.05)) as servers:
        asked = jobs(4, ignore_eos=True)
        assert all(reply.elapsed_s >= 8 * 0.05 for reply in check_answers(servers, asked))
        info = server_info(servers[0].url)["internal_states"][0]
        assert (info["num_requests"], servers[0].record().num_restarts) == (4, 0)


def test_a_request_that_a_living_server_forgot_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENCE_S", 0.1)
    monkeypatch.setattr(client_module, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(client_module, "TIMEOUT_PER_TOKEN_S", 0.0)
    forgetful = HTTPServer(("127.0.0.1", 0), _ForgetsTheFirst)
    threading.Thread(target=forgetful.serve_forever, daemon=True).start()
    server = AttachedServer(f"http://127.0.0.1:{forgetful.server_port}")
    try:
        [outcome] = completed([server], iter(jobs(1)), max_in_flight=1)
    finally:
        forgetful.shutdown()
        forgetful.server_close()
    assert isinstance(outcome.result, Reply)
    assert outcome.result.meta["id"] == "r-0#2"


def test_a_request_that_a_dead_client_left_behind_is_asked_again_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.001)
    slow = Job("r", [1], {**GREEDY, "ignore_eos": True})
    with serving(tmp_path, Behaviour(step_delay_s=0.1)) as servers:
        # As the server sees a client that was killed: it goes on for a while.
        left_behind = completed(servers, iter([slow]), max_in_flight=1)
        pending = threading.Thread(target=lambda: list(left_behind), daemon=True)
        pending.start()
        while server_info(servers[0].url)["internal_states"][0]["num_requests"] < 1:
            time.sleep(0.01)
        [outcome] = completed(servers, iter([slow]), max_in_flight=1)
        pending.join()
    assert isinstance(outcome.result, Reply)
    assert outcome.result.meta["id"] == "r#2"


def test_a_server_that_dies_every_time_ends_the_work(tmp_path: Path) -> None:
    with (
        serving(tmp_path, Behaviour(die_after=5), max_restarts=1) as servers,
        pytest.raises(ServerLost, match="server test-0 is gone"),
    ):
        list(completed(servers, iter(jobs(60)), max_in_flight=8))


def test_jobs_are_read_only_when_there_is_room(tmp_path: Path) -> None:
    num_read = 0

    def read() -> Iterator[Job]:
        nonlocal num_read
        for job in jobs(30):
            num_read += 1
            yield job

    with serving(tmp_path) as servers:
        for num_done, _ in enumerate(completed(servers, read(), max_in_flight=4)):
            assert num_read <= num_done + 4
    assert num_read == 30


def test_jobs_that_an_outcome_brings_in_are_asked_while_others_are_in_flight(tmp_path: Path) -> None:
    waiting = [Job("slow", [1], {**GREEDY, "max_new_tokens": 100, "ignore_eos": True}), Job("quick", [2], GREEDY)]
    order = []
    with serving(tmp_path, Behaviour(step_delay_s=0.01)) as servers:
        for job, _ in completed(servers, _Popped(waiting), max_in_flight=4):
            order.append(job.rid)
            if job.rid == "quick":
                waiting.append(Job("next", [3], GREEDY))
    assert order == ["quick", "next", "slow"]


def test_a_caller_that_stops_leaves_nothing_in_flight(tmp_path: Path) -> None:
    with serving(tmp_path, Behaviour(step_delay_s=0.01)) as servers:
        outcomes = completed(servers, iter(jobs(1000)), max_in_flight=8)
        next(outcomes)
        outcomes.close()  # type: ignore[attr-defined]
        num_requests = server_info(servers[0].url)["internal_states"][0]["num_requests"]
        time.sleep(0.3)
        assert server_info(servers[0].url)["internal_states"][0]["num_requests"] == num_requests <= 9
    assert not [thread for thread in threading.enumerate() if thread.name == "requests"]


def test_a_caller_that_stops_does_not_wait_for_a_server_that_starts_again(tmp_path: Path) -> None:
    behaviour = Behaviour(num_good_starts=1, hang_at_start=True, journal=str(tmp_path / "journal"))
    with serving(tmp_path, behaviour) as servers:
        outcomes = completed(servers, iter(jobs(1000)), max_in_flight=8)
        next(outcomes)
        os.kill(server_info(servers[0].url)["pid"], signal.SIGKILL)
        time.sleep(1.0)
        started_at = time.monotonic()
        outcomes.close()  # type: ignore[attr-defined]
        # The start would go on for its whole time limit.
        assert time.monotonic() - started_at < STARTUP_TIMEOUT_S / 2


def test_an_answer_ends_at_its_first_end_of_turn_token() -> None:
    # As SGLang reports it when one verification step accepts 5 7 9 and the limit is four tokens; 7 ends a turn.
    reply = Reply((3, 5, 7, 9), "length", {}, 1.0)
    assert reply.ended(frozenset({7})) == Reply((3, 5, 7), "stop", {}, 1.0)
    assert reply.ended(frozenset({9})) == Reply((3, 5, 7, 9), "stop", {}, 1.0)
    assert reply.ended(frozenset({4})) == reply


def test_sampling_has_a_seed_of_its_own_for_each_request_and_greedy_has_none() -> None:
    assert sampling_params(Sampling(5), "a/0") == {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 5}
    sampled = Sampling(5, temperature=0.7, top_p=0.9, seed=1)
    params = [sampling_params(sampled, "a/0"), sampling_params(sampled, "a/1")]
    params.append(sampling_params(sampled._replace(seed=2), "a/0"))
    assert len({one["sampling_seed"] for one in params}) == 3
    assert sampling_params(sampled, "a/0") == params[0]
    assert (params[0]["temperature"], params[0]["top_p"]) == (0.7, 0.9)


@pytest.mark.parametrize(
    ("finish_reason", "error", "words"),
    [
        ({"type": "abort", "message": "no room for it", "status_code": 400}, RequestRefused, "no room for it"),
        ({"type": "abort", "message": "aborted", "status_code": None}, RequestFailed, "aborted"),
        ({"type": "stop", "matched": "NaN happened"}, RequestFailed, "NaN happened"),
    ],
)
def test_an_answer_that_is_none_is_an_error(
    finish_reason: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.001)
    monkeypatch.setattr(_Says, "finish_reason", finish_reason)
    fake = HTTPServer(("127.0.0.1", 0), _Says)
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    try:
        server = AttachedServer(f"http://127.0.0.1:{fake.server_port}")
        [outcome] = completed([server], iter(jobs(1)), max_in_flight=1)
    finally:
        fake.shutdown()
        fake.server_close()
    assert isinstance(outcome.result, error)
    assert words in str(outcome.result)


def test_one_check_serves_all_requests_that_a_dead_server_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    behaviour = Behaviour(die_after=30, num_faulty_starts=1, step_delay_s=0.01, journal=str(tmp_path / "journal"))
    with serving(tmp_path, behaviour) as servers, caplog.at_level(logging.WARNING):
        check_answers(servers, jobs(60), max_in_flight=30)
    assert sum("is alive" in record.message for record in caplog.records) == 1


class _Popped(Iterator[Job]):
    """The jobs that are in a list now, from the front."""

    def __init__(self, waiting: list[Job]) -> None:
        self._waiting = waiting

    def __next__(self) -> Job:
        if not self._waiting:
            raise StopIteration
        return self._waiting.pop(0)


class _Says(BaseHTTPRequestHandler):
    """A healthy server whose every answer ends for the same reason."""

    finish_reason: dict[str, Any] = {"type": "stop", "matched": 0}  # noqa: RUF012

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        meta_info = {"id": request["rid"], "finish_reason": self.finish_reason}
        self.wfile.write(json.dumps({"output_ids": [0], "meta_info": meta_info}).encode())


class _ForgetsTheFirst(_Says):
    """Keeps the connection of its first request open and works on others."""

    forgotten: list[Any] = []  # noqa: RUF012

    def do_POST(self) -> None:
        if not self.forgotten:
            self.forgotten.append(self.request.dup())
            self.close_connection = True
            return
        super().do_POST()
