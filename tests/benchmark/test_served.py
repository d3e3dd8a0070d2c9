"""The served benchmark, whole, on servers of the tests."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specforge_core.artifacts import METRICS_NAME
from specforge_core.benchmark import lossless, references, server
from specforge_core.benchmark import run as stage
from specforge_core.benchmark.recording import REQUESTS_NAME, RESULT_NAME
from specforge_core.benchmark.served import SWEEP, sweep_workloads
from specforge_core.facts import BenchmarkResult
from specforge_core.manifest_sections import AnswerConfig, ServingConfig, SweepConfig
from specforge_core.stages import BenchmarkSpec, ResolvedBenchmark, ResolvedSource, ResolvedSuite, ServedEngine
from specforge_core.targets import GenerationRequest
from specforge_core.targets.hf import HFTarget
from tests.benchmark.test_run import write_draft
from tests.sglang_like import MODULE, Behaviour, read_journal

CHAIN, SHORT = ServingConfig(), ServingConfig(num_steps=2, num_draft_tokens=3)
SERVING = (CHAIN, SHORT, ServingConfig(concurrency=2))
NUM_PROMPTS = 4

Run = Callable[..., BenchmarkResult]


@pytest.fixture(scope="module")
def draft(talkative_target, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("draft") / "draft"
    return write_draft(directory, HFTarget(talkative_target, device="cpu"))


@pytest.fixture
def run(talkative_target, draft, tmp_path, monkeypatch) -> Run:
    """The stage, with other fields of the benchmark or the engine, and servers that behave so."""
    monkeypatch.setattr(server, "SGLANG_MODULE", MODULE)

    def measured(behaviour: Behaviour | None = None, engine: dict[str, Any] | None = None, **fields: Any):
        asked = Behaviour(**{**vars(behaviour or Behaviour()), "journal": str(tmp_path / "journal")})
        monkeypatch.setenv(*asked.variable())
        source = ResolvedSource(
            dataset="builtin:demo", config="arithmetic", split="heldout", limit=NUM_PROMPTS, content_id="x"
        )
        suite = ResolvedSuite(name="arithmetic", source=source, max_new_tokens=16, answer=AnswerConfig(kind="number"))
        benchmark = {"suites": (suite,), "serving": (CHAIN,), "repeats": 2, **fields}
        spec = BenchmarkSpec(
            target=talkative_target,
            draft=draft,
            conversations=tmp_path,
            benchmark=ResolvedBenchmark(**benchmark),
            engine=ServedEngine(name="sglang", max_running_requests=8, **(engine or {})),
            hardware="test",
        )
        return stage.main(spec, tmp_path)

    return measured


def journal(tmp_path: Path) -> list[dict[str, Any]]:
    """What the servers noted, with `side` by what their flags say: `baseline`, or the number of draft tokens."""
    lines = read_journal(tmp_path / "journal")
    sides = {}
    for line in lines:
        if line["event"] == "start":
            argv = line["argv"]
            flag = "--speculative-num-draft-tokens"
            sides[line["pid"]] = f"{argv[argv.index(flag) + 1]} tokens" if flag in argv else "baseline"
    return [{**line, "side": sides[line["pid"]]} for line in lines]


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / REQUESTS_NAME).read_text().splitlines()]


def test_sums_are_those_of_the_answers_and_every_answer_is_recorded(run, tmp_path):
    result = run(serving=SERVING)
    assert BenchmarkResult.model_validate_json((tmp_path / RESULT_NAME).read_text()) == result
    assert [(m.suite, m.serving) for m in result.measurements] == [("arithmetic", serving) for serving in SERVING]
    lines = records(tmp_path)
    assert len(lines) == len(SERVING) * 2 * NUM_PROMPTS
    for measurement in result.measurements:
        serving = measurement.serving
        own = [
            line
            for line in lines
            if (line["num_steps"], line["concurrency"]) == (serving.num_steps, serving.concurrency)
        ]
        drafted = [line for line in own if line["drafter"] == "draft"]
        assert measurement.num_prompts == len(drafted) == NUM_PROMPTS
        assert measurement.num_output_tokens == sum(line["num_output_tokens"] for line in drafted)
        assert measurement.num_verify_steps == sum(line["num_verify_steps"] for line in drafted)
        by_position = zip(*(line["accepted_by_position"] for line in drafted), strict=True)
        assert measurement.accepted_by_position == tuple(map(sum, by_position))
        # The scripted draft changes nothing, so no target had to be loaded.
        assert measurement.lossless.num_identical == NUM_PROMPTS
        assert measurement.answers.num_checked == NUM_PROMPTS
        assert (measurement.ngram_acceptance_length, measurement.in_process_acceptance_length) == (None, None)
    assert {(line["attempt"], line["round"]) for line in lines} == {(1, 0), (1, 1)}
    assert result.engine == "sglang"
    assert set(result.servers) == {"baseline", "3-1-4", "2-1-3"}
    curve = [json.loads(line) for line in (tmp_path / METRICS_NAME).read_text().splitlines()]
    assert [line["step"] for line in curve] == [1, 2, 1], "concurrency; by chain"
    assert "suites/arithmetic/3-1-4/speedup" in curve[0]


def test_servers_differ_in_the_draft_alone_and_each_chain_is_started_once(run, tmp_path):
    result = run(
        serving=SERVING, sweep=SweepConfig(chains=((2, 1, 3), (3, 1, 4)), concurrencies=(1, 2), max_new_tokens=8)
    )
    starts = [line for line in journal(tmp_path) if line["event"] == "start"]
    assert [line["side"] for line in starts] == ["baseline", "4 tokens", "3 tokens"]
    baseline, *drafting = (line["argv"] for line in starts)
    own = ["--host", "127.0.0.1", "--port"]
    shared = baseline[: baseline.index("--host")]
    assert "--max-total-tokens" in shared
    for argv in drafting:
        options = argv[: argv.index("--host")]
        assert options[: len(shared)] == shared
        added = options[len(shared) :]
        assert all(flag.startswith("--speculative-") for flag in added[::2]), added
        assert argv[len(options) : len(options) + 3] == own
    assert result.servers["baseline"].command != result.servers["3-1-4"].command


def test_rounds_alternate_and_each_run_starts_with_an_empty_cache(run, tmp_path):
    run()
    events = [(line["event"], line["side"]) for line in journal(tmp_path) if line["event"] != "start"]
    runs = [(key, len(list(group))) for key, group in itertools.groupby(events)]
    base, drafted = "baseline", "4 tokens"
    assert runs == [
        # The warm-up is one request for each slot.
        (("flush", base), 1),
        (("answer", base), 1),
        (("flush", drafted), 1),
        (("answer", drafted), 1),
        (("flush", base), 1),
        (("answer", base), 2),
        (("flush", drafted), 1),
        (("answer", drafted), 2),
        # The next flush follows at once: the second round begins with the draft.
        (("flush", drafted), 1),
        (("answer", drafted), 2),
        (("flush", base), 1),
        (("answer", base), 2),
    ]


def test_without_colocation_all_rounds_without_draft_come_first_on_a_server_alone(run, tmp_path):
    result = run(engine={"colocate": False}, serving=SERVING)
    sides = [side for side, _ in itertools.groupby(line["side"] for line in journal(tmp_path))]
    assert sides == ["baseline", "4 tokens", "3 tokens"]
    by_serving = {m.serving: m for m in result.measurements}
    # What runs without draft knows no chain, so it is measured once.
    assert by_serving[CHAIN].baseline_output_tokens_per_s == by_serving[SHORT].baseline_output_tokens_per_s
    num_answers = sum(line["event"] == "answer" and line["side"] == "baseline" for line in journal(tmp_path))
    assert num_answers == (1 + NUM_PROMPTS) + (2 + NUM_PROMPTS)


def test_a_dying_server_costs_a_run_and_nothing_else(run, tmp_path):
    undisturbed = run()
    (tmp_path / "journal").unlink()
    # The server with draft, in its second round.
    result = run(Behaviour(num_good_starts=1, num_faulty_starts=1, die_after=4))
    (first,), (second,) = undisturbed.measurements, result.measurements
    timed = {"speedup", "speedup_low", "speedup_high", "output_tokens_per_s", "baseline_output_tokens_per_s"}
    assert second.model_dump(exclude=timed) == first.model_dump(exclude=timed)
    assert result.servers["3-1-4"].num_restarts == 1
    assert [(line["drafter"], line["round"]) for line in records(tmp_path) if line["attempt"] == 2] == [
        ("draft", 1)
    ] * 2


def test_each_point_of_a_sweep_answers_its_share_at_its_concurrency(run, tmp_path):
    sweep = SweepConfig(chains=((1, 1, 2), (4, 2, 8)), concurrencies=(1, 3), requests_per_slot=2, max_new_tokens=10)
    result = run(Behaviour(step_delay_s=0.005), sweep=sweep)
    assert [(p.serving.chain(), p.serving.concurrency) for p in result.sweep] == [
        ("1-1-2", 1),
        ("1-1-2", 3),
        ("4-2-8", 1),
        ("4-2-8", 3),
    ]
    lines = [line for line in records(tmp_path) if line["suite"] == SWEEP]
    for point in result.sweep:
        own = [
            line
            for line in lines
            if (line["num_draft_tokens"], line["concurrency"])
            == (point.serving.num_draft_tokens, point.serving.concurrency)
        ]
        assert len(own) == 2 * point.num_requests
        assert point.num_requests == 2 * 2 * point.serving.concurrency, "2 rounds of 2 requests a slot"
        drafted = [line for line in own if line["drafter"] == "draft"]
        assert point.num_output_tokens == sum(line["num_output_tokens"] for line in drafted)
        assert point.num_verify_steps == sum(line["num_verify_steps"] for line in drafted)
        assert len(point.output_tokens_per_s) == len(point.baseline_output_tokens_per_s) == 2
        assert max(line["num_output_tokens"] for line in own) <= 10
    assert result.sweep[3].speedup > 1.0, "a step costs the same with and without draft"


def test_a_sweep_takes_the_prompts_of_all_suites_in_turns_and_again_where_they_run_out(run):
    suites = [[GenerationRequest(f"{name}{i}", [i]) for i in range(count)] for name, count in (("a", 1), ("b", 3))]
    sweep = SweepConfig(chains=((1, 1, 2),), concurrencies=(1, 2), requests_per_slot=2)
    spec = BenchmarkSpec.model_construct(
        benchmark=ResolvedBenchmark.model_construct(sweep=sweep, temperature=0.0, seed=0)
    )
    narrow, wide = sweep_workloads(spec, suites)
    assert [request.id for request in narrow.requests] == ["a0/0", "b0/1", "b1/2", "b2/3"]
    assert [request.id for request in wide.requests] == [
        *("a0/0", "b0/1", "b1/2", "b2/3"),
        *("a0/4", "b0/5", "b1/6", "b2/7"),
    ]


def test_earlier_turns_are_had_with_the_server_without_draft(run, tmp_path):
    source = ResolvedSource(dataset="builtin:demo", config="followup", split="heldout", limit=3, content_id="x")
    suite = ResolvedSuite(name="followup", source=source, max_new_tokens=200)
    (measurement,) = run(suites=(suite,)).measurements
    assert measurement.num_prompts == 3
    lines = journal(tmp_path)
    first_flush = next(i for i, line in enumerate(lines) if line["event"] == "flush")
    # Every first question is asked once, before anything is timed.
    asked = [line["rid"] for line in lines[:first_flush] if line["event"] == "answer"]
    assert len(set(asked)) == 3
    assert {line["side"] for line in lines[:first_flush] if line["event"] == "answer"} == {"baseline"}


def test_a_server_that_does_not_draft_fails_the_stage(run):
    with pytest.raises(ValueError, match="it does not draft"):
        run(Behaviour(hides_draft_figures=True))


def test_too_little_room_is_said(run, caplog):
    run(Behaviour(max_capacity=100))
    assert "server baseline has room for 100 tokens" in caplog.text
    assert "server 3-1-4 has room for 100 tokens" in caplog.text


def test_servers_of_others_are_refused(run):
    with pytest.raises(ValueError, match="starts its own"):
        run(engine={"urls": ("http://127.0.0.1:1",)})


def test_the_target_is_not_loaded_when_all_answers_are_the_same(run, monkeypatch):
    def load(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the target was loaded")

    monkeypatch.setattr(lossless, "HFTarget", load)
    monkeypatch.setattr(references, "HFTarget", load)
    (measurement,) = run().measurements
    assert measurement.lossless.num_identical == NUM_PROMPTS


@pytest.mark.slow
def test_a_real_target_accepts_the_same_served_and_in_process(run):
    result = run(Behaviour(answers="model"), num_in_process_prompts=3, serving=(CHAIN, ServingConfig(concurrency=2)))
    for measurement in result.measurements:
        assert measurement.lossless.num_identical == NUM_PROMPTS
        assert measurement.in_process_acceptance_length == measurement.served_on_same_prompts
        assert measurement.in_process_acceptance_length >= 1.0


def test_a_target_that_cannot_be_decoded_in_process_is_refused_before_anything_is_measured(run, tmp_path, monkeypatch):
    def refuse(config: Any) -> None:
        raise ValueError("it has sliding_window layers")

    monkeypatch.setattr("specforge_core.benchmark.served.check_rewindable", refuse)
    with pytest.raises(ValueError, match="sliding_window"):
        run(num_in_process_prompts=3)
    assert journal(tmp_path) == []
