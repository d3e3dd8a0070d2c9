"""The load generator against a server whose answers are made up, so that every figure follows from the flags."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from specforge_core.benchmark.client import Reply, within_context
from specforge_core.benchmark.load import ServedModel, flush_cache, generation_of, run_load, served_side
from specforge_core.benchmark.measure import Workload
from specforge_core.benchmark.server import Launch, Server, ServerLost, running_servers, server_info
from specforge_core.benchmark.server_flags import draft_options
from specforge_core.manifest_sections import ServingConfig
from specforge_core.targets import GenerationRequest, Sampling
from tests.sglang_like import MODULE, Behaviour, read_journal
from tests.sglang_like.answers import CONTEXT_LENGTH, EOS_TOKEN_ID

MODEL = ServedModel(frozenset({EOS_TOKEN_ID}), CONTEXT_LENGTH, num_steps=0)
DRAFT = ServingConfig(num_steps=2, num_draft_tokens=3)
DRAFTED = MODEL._replace(num_steps=2)
REQUESTS = [GenerationRequest(f"r{i}", [i + 1, 7]) for i in range(12)]


@contextlib.contextmanager
def served(directory: Path, behaviour: Behaviour, *, drafts: bool = False) -> Iterator[Server]:
    launch = Launch(
        python=sys.executable,
        module=MODULE,
        options={"--model-path": "scripted", **(draft_options(Path("draft"), DRAFT) if drafts else {})},
        environment=dict([behaviour.variable()]),
        startup_timeout_s=60,
    )
    with running_servers(launch, name="test", gpu_groups=[()], directory=directory) as (server,):
        yield server


def test_as_many_requests_as_there_are_workers_are_in_flight_and_never_more(tmp_path):
    done = []
    with served(tmp_path, Behaviour(step_delay_s=0.01)) as server:
        for concurrency in (1, 4):
            run = run_load(
                server, MODEL, REQUESTS, Sampling(8), concurrency=concurrency, advance=lambda: done.append(1)
            )
            assert server_info(server.url)["internal_states"][0]["peak_running"] == concurrency
            assert sorted(one.generation.completion.id for one in run.answered) == sorted(r.id for r in REQUESTS)
            assert run.is_undisturbed
            # Nobody waits: the first of all workers start before any has an answer, and the run ends with its last.
            starts = sorted(one.started_s for one in run.answered)
            ends = sorted(one.started_s + one.generation.elapsed_s for one in run.answered)
            assert starts[concurrency - 1] < ends[0]
            assert ends[-1] <= run.elapsed_s < ends[-1] + 0.5
            for generation, _, _ in run.answered:
                assert generation.elapsed_s >= 0.01 * len(generation.completion.token_ids)
    assert len(done) == 2 * len(REQUESTS)


def test_a_draft_changes_no_token_and_its_steps_add_up(tmp_path):
    with served(tmp_path / "base", Behaviour()) as base, served(tmp_path / "draft", Behaviour(), drafts=True) as draft:
        without, drafted = (
            {
                one.generation.completion.id: one.generation
                for one in run_load(server, model, REQUESTS, Sampling(40), concurrency=3, advance=int).answered
            }
            for server, model in ((base, MODEL), (draft, DRAFTED))
        )
    for id, generation in drafted.items():
        assert generation.completion == without[id].completion
        num_tokens = len(generation.completion.token_ids)
        assert without[id].num_verify_steps == num_tokens - 1
        # One token from the prefill, one of the target's own a step; the last step may be cut.
        surplus = 1 + generation.num_verify_steps + sum(generation.accepted_by_position) - num_tokens
        assert 0 <= surplus <= DRAFT.num_steps
        assert len(generation.accepted_by_position) == DRAFT.num_steps


def reply(token_ids: tuple[int, ...], **meta: object) -> Reply:
    return Reply(token_ids, "length", dict(meta), 1.0)


def test_the_histogram_becomes_acceptances_by_position_and_tokens_behind_the_end_go():
    # Of 7 steps 2 accept nothing, 4 one token and 1 three.
    meta = {"spec_verify_ct": 7, "spec_correct_drafts_histogram": [2, 4, 0, 1]}
    generation = generation_of("r", reply((5, 6, EOS_TOKEN_ID, 8), **meta), MODEL._replace(num_steps=4), 2.0)
    assert generation.accepted_by_position == (5, 1, 1, 0)
    assert (generation.num_verify_steps, generation.elapsed_s) == (7, 2.0)
    assert (generation.completion.token_ids, generation.completion.finish_reason) == ((5, 6, EOS_TOKEN_ID), "stop")


def test_an_answer_of_one_token_has_no_step_and_no_figures():
    generation = generation_of("r", reply((5,)), DRAFTED, 2.0)
    assert (generation.num_verify_steps, generation.accepted_by_position) == (0, (0, 0))


def test_a_server_that_does_not_draft_is_refused(tmp_path):
    with (
        served(tmp_path, Behaviour(hides_draft_figures=True), drafts=True) as server,
        pytest.raises(ValueError, match="reports no spec_verify_ct: it does not draft"),
    ):
        run_load(server, DRAFTED, REQUESTS, Sampling(40), concurrency=2, advance=int)


def test_no_request_runs_past_the_context():
    request = GenerationRequest("r", [1] * 90)
    assert within_context(Sampling(8), request, 100).max_new_tokens == 8
    assert within_context(Sampling(80), request, 100).max_new_tokens == 10


def workload(concurrency: int) -> Workload:
    return Workload("suite", REQUESTS, Sampling(6), ServingConfig(concurrency=concurrency), repeats=2)


def test_a_run_in_which_the_server_dies_is_made_again_after_a_warm_up(tmp_path):
    journal = str(tmp_path / "journal")
    behaviour = Behaviour(journal=journal, die_after=5, num_faulty_starts=1)
    with served(tmp_path, behaviour) as server:
        run = served_side(server, MODEL)(workload(2), REQUESTS, int)
    assert run.generations.keys() == run.timings.keys() == {request.id for request in REQUESTS}
    assert {timing.attempt for timing in run.timings.values()} == {2}
    lines = read_journal(journal)
    events = [line["event"] for line in lines]
    assert events.count("start") == 2
    # The disturbed run, the warm-up, the run that counts: each starts with an empty cache.
    assert events.count("flush") == 3
    second_pid = [line["pid"] for line in lines if line["event"] == "start"][1]
    last_flush = max(i for i, event in enumerate(events) if event == "flush")
    counted = [line for line in lines[last_flush + 1 :] if line["event"] == "answer"]
    assert [line["pid"] for line in counted] == [second_pid] * len(REQUESTS)
    assert sorted(line["rid"] for line in counted) == sorted(run.generations)


def test_a_server_that_fails_in_every_run_is_given_up(tmp_path):
    with (
        served(tmp_path, Behaviour(fail_every=5)) as server,
        pytest.raises(ServerLost, match="no run of 3 went through without a disturbance"),
    ):
        served_side(server, MODEL)(workload(2), REQUESTS, int)


def test_flushing_starts_a_dead_server_again(tmp_path):
    journal = str(tmp_path / "journal")
    with served(tmp_path, Behaviour(journal=journal)) as server:
        os.kill(server_info(server.url)["pid"], signal.SIGKILL)
        flush_cache(server)
    assert [line["event"] for line in read_journal(journal)] == ["start", "start", "flush"]
