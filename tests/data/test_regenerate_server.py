"""The stage through servers: the same conversations, whoever dies on the way. Real processes and real HTTP."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from specforge_core.artifacts import PROGRESS_DIRECTORY
from specforge_core.benchmark import client as client_module
from specforge_core.benchmark import server as server_module
from specforge_core.benchmark.server import Launch, ServerLost, running_servers, server_info
from specforge_core.data import regenerate as stage
from specforge_core.data.conversations import conversation_shards, load_conversations
from specforge_core.data.regenerate import JOURNAL_NAME
from specforge_core.facts import Conversations
from specforge_core.stages import RegenerateSpec, ResolvedTarget, UnmeasuredEngine
from tests import tiny
from tests.data.scripted_target import make_spec, write_rows
from tests.sglang_like import MODULE, Behaviour, read_journal

REPOSITORY = Path(__file__).parents[2]
NUM_ROWS = 30
CHILD = """
import sys
from pathlib import Path
from specforge_core.benchmark import server
from specforge_core.data.regenerate import main
from specforge_core.stages import RegenerateSpec
server.SGLANG_MODULE = sys.argv[3]
main(RegenerateSpec.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def _servers_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SGLANG_MODULE", MODULE)


@pytest.fixture
def served_spec(tmp_path: Path, tiny_target: ResolvedTarget) -> RegenerateSpec:
    """Conversations of one to three turns with the tiny target's tokenizer."""
    rows = [{"turns": [f"question {i}"] + ["and then?"] * (i % 3)} for i in range(NUM_ROWS)]
    return make_served(tmp_path, tiny_target, rows)


def make_served(directory: Path, target: ResolvedTarget, rows: list[dict[str, Any]], **engine: Any) -> RegenerateSpec:
    data = make_spec(write_rows(directory / "prompts.jsonl", rows), max_prompt_tokens=480, max_new_tokens=24).data
    return RegenerateSpec(
        target=target, engine=UnmeasuredEngine(name="sglang", max_running_requests=4, **engine), data=data
    )


def run(spec: RegenerateSpec, out: Path, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch) -> Conversations:
    monkeypatch.setenv(*behaviour.variable())
    return stage.main(spec, out)


def shard_bytes(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in conversation_shards(directory)]


def journal_ids(directory: Path) -> list[str]:
    lines = (directory / PROGRESS_DIRECTORY / JOURNAL_NAME).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["id"] for line in lines[1:]]


def test_a_server_gives_the_very_conversations_that_the_target_in_process_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny.resolved(tiny.make_talkative_target(tmp_path / "target"))
    rows = [{"turns": [f"question {i}", "why?", "and then?"]} for i in range(8)]
    # The last question does not fit.
    spec = make_served(tmp_path, target, [*rows, {"turns": ["too long " * 60]}])
    facts = run(spec, tmp_path / "served", Behaviour(answers="model"), monkeypatch)
    in_process = spec.model_copy(update={"engine": UnmeasuredEngine(name="transformers"), "batch_size": 1})
    assert stage.main(in_process, tmp_path / "in-process") == facts
    assert list(load_conversations(tmp_path / "served")) == list(load_conversations(tmp_path / "in-process"))
    assert (facts.num_conversations, facts.num_failed) == (8, 1)
    assert any(len(row["finish_reasons"]) > 1 for row in load_conversations(tmp_path / "served"))


@pytest.mark.parametrize(
    "fault",
    [
        {"die_after": 15, "num_faulty_starts": 2},
        {"fail_every": 7, "drop_every": 11, "abort_every": 13},
    ],
)
def test_a_server_that_breaks_costs_nothing_but_time(
    served_spec: RegenerateSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, int]
) -> None:
    # Six attempts at a request would all fail now and then.
    monkeypatch.setattr(client_module, "MAX_ATTEMPTS", 20)
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.001)
    undisturbed = run(served_spec, tmp_path / "undisturbed", Behaviour(), monkeypatch)
    behaviour = Behaviour(journal=str(tmp_path / "journal"), step_delay_s=0.001, **fault)  # type: ignore[arg-type]
    assert run(served_spec, tmp_path / "broken", behaviour, monkeypatch) == undisturbed
    assert shard_bytes(tmp_path / "broken") == shard_bytes(tmp_path / "undisturbed")
    ids = journal_ids(tmp_path / "broken")
    assert len(ids) == len(set(ids)) > NUM_ROWS
    num_starts = sum(line["event"] == "start" for line in read_journal(tmp_path / "journal"))
    assert num_starts == 1 + fault.get("num_faulty_starts", 0)


@pytest.mark.slow
def test_a_stage_killed_without_warning_goes_on_and_gives_what_an_undisturbed_one_gives(
    served_spec: RegenerateSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(served_spec, tmp_path / "undisturbed", Behaviour(), monkeypatch)
    (tmp_path / "spec.json").write_text(served_spec.model_dump_json(), encoding="utf-8")
    killed = tmp_path / "killed"
    slow = Behaviour(step_delay_s=0.02, journal=str(tmp_path / "journal"))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "spec.json"), str(killed), MODULE],
        cwd=REPOSITORY,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "child-cache"), **dict([slow.variable()])},
    )
    journal = killed / PROGRESS_DIRECTORY / JOURNAL_NAME
    deadline = time.monotonic() + 60
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 12:
        assert child.poll() is None, "the child ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done_before = set(journal_ids(killed))

    # A journal of its own, so that it tells what the second run was asked.
    behaviour = Behaviour(journal=str(tmp_path / "second journal"))
    assert run(served_spec, killed, behaviour, monkeypatch) == undisturbed
    assert shard_bytes(killed) == shard_bytes(tmp_path / "undisturbed")
    asked = {line["rid"] for line in read_journal(tmp_path / "second journal") if line["event"] == "answer"}
    assert asked
    assert not asked & done_before
    ids = journal_ids(killed)
    assert len(ids) == len(set(ids)) == len(asked) + len(done_before)


def test_a_server_that_dies_every_time_ends_the_stage_and_what_it_answered_is_kept(
    served_spec: RegenerateSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ServerLost, match=r"server target-0 is gone"):
        # The stage allows each server three restarts.
        run(served_spec, out, Behaviour(die_after=6), monkeypatch)
    num_kept = len(journal_ids(out))
    assert 0 < num_kept <= 4 * 6
    facts = run(served_spec, out, Behaviour(), monkeypatch)
    undisturbed = run(served_spec, tmp_path / "undisturbed", Behaviour(), monkeypatch)
    assert facts == undisturbed
    assert shard_bytes(out) == shard_bytes(tmp_path / "undisturbed")


def test_every_gpu_has_a_server_and_each_has_a_few_requests_waiting(
    served_spec: RegenerateSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specforge_core.benchmark.stage_servers.visible_devices", lambda: ("4", "5", "6", "7"))
    spec = served_spec.model_copy(
        update={"engine": served_spec.engine.model_copy(update={"tensor_parallel": 2, "python": sys.executable})}
    )
    behaviour = Behaviour(journal=str(tmp_path / "journal"), step_delay_s=0.001)
    run(spec, tmp_path / "out", behaviour, monkeypatch)
    lines = read_journal(tmp_path / "journal")
    records = sorted((tmp_path / "out" / "servers").glob("*.json"))
    assert [json.loads(path.read_text())["gpus"] for path in records] == [["4", "5"], ["6", "7"]]
    counts = {line["pid"]: 0 for line in lines if line["event"] == "start"}
    for line in lines:
        if line["event"] == "answer":
            counts[line["pid"]] += 1
    assert len(counts) == 2
    assert min(counts.values()) > sum(counts.values()) / 3


def test_servers_that_run_already_are_used_and_must_have_the_target(
    served_spec: RegenerateSpec, tmp_path: Path, tiny_target: ResolvedTarget
) -> None:
    def attached(model: str, out: Path) -> Conversations:
        launch = Launch(python=sys.executable, module=MODULE, options={"--model-path": model}, startup_timeout_s=20)
        with running_servers(launch, name="test", gpu_groups=[()], directory=tmp_path / "servers") as (server,):
            engine = served_spec.engine.model_copy(update={"urls": (server.url,)})
            facts = stage.main(served_spec.model_copy(update={"engine": engine}), out)
            assert server_info(server.url)["internal_states"][0]["num_requests"] > NUM_ROWS
            return facts

    assert attached(tiny_target.model, tmp_path / "out").num_conversations > NUM_ROWS // 2
    with pytest.raises(ValueError, match=r"was started with --model-path other, this stage needs .*: start it with"):
        attached("other", tmp_path / "out-2")
