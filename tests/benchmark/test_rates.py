"""Stages are held against what their server can do; hand-made figures, and the program on servers of the tests."""

import json
import sys
from pathlib import Path

import pytest

from specforge_core.benchmark import rates as program
from specforge_core.benchmark import server as server_module
from specforge_core.benchmark.rates import take_turns
from specforge_core.benchmark.rates_capture import make_work, with_context
from specforge_core.benchmark.rates_results import Comparison, Pass, ServingRates, markdown
from specforge_core.benchmark.saturation import RawRequest, saturate
from specforge_core.data.conversations import scan_columns
from specforge_core.facts import Environment
from specforge_core.stages import ResolvedTarget
from tests import factory, tiny
from tests.benchmark.test_server import serving
from tests.sglang_like import MODULE, Behaviour, read_journal


def one_pass(num_tokens: int, elapsed_s: float, served_s: float | None = None, written_bytes: int = 0) -> Pass:
    return Pass(
        num_requests=4,
        num_tokens=num_tokens,
        elapsed_s=elapsed_s,
        served_s=served_s or elapsed_s,
        written_bytes=written_bytes,
    )


COMPARISON = Comparison(
    stage="capture",
    work="1,024 tokens each",
    supervised_share=0.5,
    limit=(one_pass(40_000, 1.0), one_pass(40_000, 2.0), one_pass(40_000, 1.0)),
    ours=(
        one_pass(40_000, 1.25, 1.0, 5 * 10**9),
        one_pass(40_000, 2.0, 1.6, 10**9),
        one_pass(40_000, 2.0, 1.25, 2 * 10**9),
    ),
)


def test_rates_and_ratios_are_those_of_a_hand_calculation() -> None:
    assert [one.tokens_per_s for one in COMPARISON.ours] == [32_000, 20_000, 20_000]
    assert [one.served_tokens_per_s for one in COMPARISON.ours] == [40_000, 25_000, 32_000]
    # Pass against pass: 32/40, 20/20, 20/40.
    assert COMPARISON.ratios == (0.8, 1.0, 0.5)
    assert COMPARISON.served_ratios == (1.0, 1.25, 0.8)


def test_the_report_shows_median_and_spread() -> None:
    made_on = Environment(cpu="x", num_threads=1, gpu="Made-up 9000", versions={}, commit="abc", command="python")
    text = markdown(ServingRates(environment=made_on, target="T", disk_bytes_per_s=1.5e9, comparisons=(COMPARISON,)))
    row = next(line for line in text.splitlines() if line.startswith("| capture"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "capture",
        "1,024 tokens each; 4 requests, 40,000 tokens",
        "50%",
        "40,000 (20,000 to 40,000)",
        "20,000 (20,000 to 32,000)",
        "80.0% (50.0% to 100.0%)",
        "100.0% (80.0% to 125.0%)",
        # 5 GB in 1.25 s, 1 GB in 2 s, 2 GB in 2 s.
        "1.00 (0.50 to 4.00)",
    ]
    assert "1.50 GB/s" in text


def test_sides_take_turns_at_being_first() -> None:
    order = []

    def limit() -> Pass:
        order.append("limit")
        return one_pass(1, 1.0)

    def ours() -> Pass:
        order.append("ours")
        return one_pass(2, 1.0)

    limits, owns = take_turns(limit, ours, repeats=3)
    assert order == ["limit", "ours", "ours", "limit", "limit", "ours"]
    assert ([one.num_tokens for one in limits], [one.num_tokens for one in owns]) == ([1] * 3, [2] * 3)


def test_documents_have_the_wanted_lengths_and_share(tmp_path: Path) -> None:
    work = make_work("100", 0.25, num_tokens=1000, vocab_size=50, directory=tmp_path / "uniform")
    assert (work.name, work.lengths, work.supervised_share) == ("100 tokens each", (100,) * 10, 0.25)
    assert work.first(3).lengths == (100,) * 3
    rows = [row for batch in scan_columns(work.conversations, ["input_ids", "loss_mask"]) for row in batch.to_pylist()]
    assert all(row["loss_mask"] == [False] * 75 + [True] * 25 for row in rows)
    assert all(0 <= token_id < 50 for row in rows for token_id in row["input_ids"])
    real = make_work("real", 0.5, num_tokens=20_000, vocab_size=50, directory=tmp_path / "real")
    assert len(set(real.lengths)) > 10
    assert real.supervised_share == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="neat"):
        make_work("neat", 0.5, num_tokens=1000, vocab_size=50, directory=tmp_path / "neat")


def test_a_short_context_is_lengthened_in_a_view_of_the_target(tiny_target: ResolvedTarget, tmp_path: Path) -> None:
    config = type("Config", (), {"max_position_embeddings": 512})()
    assert with_context(tiny_target, config, 512, tmp_path / "same") is tiny_target
    longer = Path(with_context(tiny_target, config, 4160, tmp_path / "longer").model)
    original = Path(tiny_target.model)
    assert {path.name for path in longer.iterdir()} == {path.name for path in original.iterdir()}
    values, before = (json.loads((folder / "config.json").read_text()) for folder in (longer, original))
    assert values == before | {"max_position_embeddings": 4160}
    assert before["max_position_embeddings"] == 512
    with pytest.raises(ValueError, match="org/name"):
        with_context(ResolvedTarget(model="org/name", content_id="x"), config, 4160, tmp_path / "hub")


def test_a_saturated_server_gets_everything_at_once_and_answers_in_full(tmp_path: Path) -> None:
    requests = [RawRequest(f"r{i}", [i, 1, 2], 5 + i) for i in range(8)]
    behaviour = Behaviour(step_delay_s=0.03)
    with serving(tmp_path, behaviour) as (server,):
        done = saturate(server.url, requests)
        peak = server_module.server_info(server.url)["internal_states"][0]["peak_running"]
    # 5 + .. + 12; the longest takes 12 steps of 0.03 s, one after the other they would take 68.
    assert (done.num_prompt_tokens, done.num_output_tokens, peak) == (24, 68, 8)
    assert 12 * 0.03 <= done.elapsed_s < 68 * 0.03


def test_a_load_that_is_not_answered_in_full_is_no_measurement(tmp_path: Path) -> None:
    with serving(tmp_path, Behaviour(fail_every=3)) as (server,), pytest.raises(RuntimeError, match="status 500"):
        saturate(server.url, [RawRequest(f"r{i}", [1], 2) for i in range(3)])
    with serving(tmp_path, Behaviour(abort_every=2)) as (server,), pytest.raises(RuntimeError, match="asks for 9"):
        saturate(server.url, [RawRequest(f"r{i}", [1], 9) for i in range(3)])


@pytest.fixture
def target_folder(tmp_path: Path) -> Path:
    return tiny.make_talkative_target(tmp_path / "target")


@pytest.mark.slow
def test_the_program_measures_both_stages_and_writes_a_typed_report(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    monkeypatch.setattr(server_module, "SGLANG_MODULE", MODULE)
    monkeypatch.setenv(*Behaviour(answers="model", journal=str(journal)).variable())
    factory.write_prompts(tmp_path / "prompts.jsonl", verb="Count", count=5)
    status = program.main(
        [
            *("--target", str(target_folder), "--python", sys.executable, "--dtype", "float32"),
            *("--lengths", "40", "600", "--tokens", "1200", "--tokens-per-shard", "200", "--features", "float32"),
            *("--prompts", str(tmp_path / "prompts.jsonl"), "--num-prompts", "5", "--max-new-tokens", "12"),
            *("--repeats", "2", "--max-running-requests", "4"),
            *("--scratch", str(tmp_path), "--out", str(tmp_path / "reports"), "--name", "test", "--commit", "abc"),
        ]
    )
    assert status == 0
    rates = ServingRates.model_validate_json((tmp_path / "reports" / "test.json").read_text())
    regenerated, short, long = rates.comparisons
    assert (regenerated.stage, regenerated.ours[0].num_requests) == ("regenerate", 5)
    assert {one.num_tokens for one in (*regenerated.limit, *regenerated.ours)} == {regenerated.ours[0].num_tokens}
    assert [(one.num_requests, one.num_tokens) for one in short.ours] == [(30, 1200)] * 2
    # 600 tokens are more than the target's context has.
    assert [(one.num_requests, one.num_tokens) for one in long.limit] == [(2, 1200)] * 2
    # Three layers of 64 float32 a token, and one more where the next is supervised, every second one.
    assert short.ours[0].written_bytes >= 1200 * (3 * 64 * 4) + 600 * 64 * 4
    assert all(ratio > 0 for one in rates.comparisons for ratio in one.ratios)
    assert set(rates.servers) == {"capture", "prefill", "regenerate"}
    starts = [line["argv"] for line in read_journal(journal) if line["event"] == "start"]
    plain, hooked = (
        next(argv for argv in starts if "--disable-radix-cache" in argv and ("--forward-hooks" in argv) is has_hooks)
        for has_hooks in (False, True)
    )
    # Nothing else differs between the two sides of capture.
    place = hooked.index("--forward-hooks")
    assert plain[:-1] == hooked[:place] + hooked[place + 2 : -1]
    assert "| regenerate |" in (tmp_path / "reports" / "test.md").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("rates-")]
