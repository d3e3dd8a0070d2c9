"""Both backends capture the same: a target in this process, and one behind servers that run the hook.

T tokens, U of them teach, L layers, D width, V vocabulary.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from specforge_core.benchmark import server
from specforge_core.data.shards import Shard, StoredDocument, load_index, load_target_head
from specforge_core.facts import HiddenStates
from specforge_core.manifest_sections import FeaturesConfig
from specforge_core.stages import CaptureSpec, ResolvedTarget, UnmeasuredEngine
from specforge_core.targets import capture, handover
from specforge_core.targets.forward_files import HookError
from tests.data.feature_files import damaged_shards
from tests.sglang_like import MODULE, Behaviour, read_journal
from tests.targets.test_capture import LAYERS, make_conversations

SHAPES = [(10, 20), (5, 30), (40, 50), (1, 1), (60, 12), (3, 90), (7, 7)]
ENGINES = ["transformers", "sglang"]


@pytest.fixture(autouse=True)
def _servers_of_the_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(server, "SGLANG_MODULE", MODULE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # Several servers on few cores: threads that wait for each other take minutes.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    behave(monkeypatch, tmp_path)
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(handover, "MEMORY", memory)
    yield
    assert list(memory.iterdir()) == [], "a folder was left in memory"


def behave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, answers: str = "model", **faults: int) -> None:
    behaviour = Behaviour(answers=answers, journal=str(tmp_path / "journal"), **faults)  # type: ignore[arg-type]
    monkeypatch.setenv(*behaviour.variable())


def make_spec(target: ResolvedTarget, conversations: Path, engine: str, *, tokens_per_shard: int = 120) -> CaptureSpec:
    return CaptureSpec(
        target=target,
        engine=UnmeasuredEngine(name=engine),
        conversations=conversations,
        algorithm="eagle3",
        aux_layers=None,
        features=FeaturesConfig(dtype=target.dtype, tokens_per_shard=tokens_per_shard),
        max_document_tokens=80,
        batch_tokens=64,
    )


def stored_documents(directory: Path) -> dict[str, StoredDocument]:
    documents = {}
    for record in load_index(directory).shards:
        shard = Shard(directory / record.name)
        for i, (name, length) in enumerate(zip(shard.document_ids, shard.lengths, strict=True)):
            documents[name] = shard.read(i, length)
    return documents


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_what_is_captured_is_what_the_target_computes(
    tmp_path: Path, tiny_target: ResolvedTarget, engine: str, dtype: str
) -> None:
    target = tiny_target.model_copy(update={"dtype": dtype})
    facts = capture.main(make_spec(target, make_conversations(tmp_path / "read", SHAPES), engine), tmp_path)
    # Cut at 80 tokens: 90 and 93 lose 10 and 13 answers.
    lengths = [min(80, prompt + answer) for prompt, answer in SHAPES]
    assert (facts.num_documents, facts.num_tokens) == (len(SHAPES), sum(lengths))
    assert (facts.layers, facts.num_target_layers, facts.hidden_size, facts.dtype) == (LAYERS, 8, 64, dtype)
    assert damaged_shards(tmp_path) == []
    plain, rounded = (
        AutoModelForCausalLM.from_pretrained(target.model, dtype=getattr(torch, name)) for name in ("float64", dtype)
    )
    documents = stored_documents(tmp_path)
    assert list(documents) == [f"conversation-{i}" for i in range(len(SHAPES))]
    head_VD = load_target_head(tmp_path).lm_head_VD.double()
    for (prompt, _), length, stored in zip(SHAPES, lengths, documents.values(), strict=True):
        assert len(stored.input_ids) == length
        with torch.no_grad():
            exact, eager = (
                model(stored.input_ids.long()[None], output_hidden_states=True).hidden_states
                for model in (plain, rounded)
            )
        teaching = slice(prompt - 1, length - 1)
        for j, layer in enumerate(LAYERS):
            exact_TD, eager_TD = exact[layer + 1][0], eager[layer + 1][0]
            budget = 1.5 * relative_error(eager_TD, exact_TD) + 1e-6
            assert relative_error(stored.aux_hidden[:, j], exact_TD) <= budget
        exact_UD, eager_UD = exact[-1][0, teaching], eager[-1][0, teaching]
        assert relative_error(stored.last_hidden, exact_UD) <= 1.5 * relative_error(eager_UD, exact_UD) + 1e-6
        # Of the stored state, not of the exact one: whatever that lost, these follow from it.
        logits_UV = stored.last_hidden.double() @ head_VD.T
        greedy = logits_UV.gather(1, stored.target_argmax.long()[:, None])[:, 0]
        torch.testing.assert_close(greedy, logits_UV.max(dim=-1).values, rtol=0, atol=1e-5)
        torch.testing.assert_close(stored.target_logsumexp.double(), logits_UV.logsumexp(-1), rtol=0, atol=1e-4)


def captured_by(engine: str, directory: Path, spec: CaptureSpec) -> HiddenStates:
    directory.mkdir()
    return capture.main(spec.model_copy(update={"engine": UnmeasuredEngine(name=engine)}), directory)


def check_same(left: Path, right: Path) -> None:
    """The same documents, with features that differ by rounding in float32."""
    found, expected = stored_documents(left), stored_documents(right)
    assert list(found) == list(expected)
    for name, document in expected.items():
        for field in ("input_ids", "loss_mask", "target_argmax"):
            assert torch.equal(getattr(found[name], field), getattr(document, field)), (name, field)
        for field in ("aux_hidden", "last_hidden", "target_logsumexp"):
            torch.testing.assert_close(getattr(found[name], field), getattr(document, field), rtol=1e-4, atol=1e-4)
    for name in ("config.json", "target_head.safetensors"):
        assert (left / name).read_bytes() == (right / name).read_bytes()


@pytest.mark.slow
def test_a_server_gives_what_the_target_gives_in_this_process_in_chunks_too(
    tmp_path: Path, tiny_target: ResolvedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tiny_target, make_conversations(tmp_path / "read", SHAPES), "transformers")
    expected = captured_by("transformers", tmp_path / "transformers", spec)
    options = handover.Handover.options.__get__
    monkeypatch.setattr(
        handover.Handover, "options", property(lambda self: {**options(self), "--chunked-prefill-size": 16})
    )
    assert captured_by("sglang", tmp_path / "chunked", spec) == expected
    check_same(tmp_path / "chunked", tmp_path / "transformers")


@pytest.mark.slow
def test_a_server_that_is_killed_on_the_way_changes_nothing(
    tmp_path: Path, tiny_target: ResolvedTarget, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handover, "WAIT_S", 2.0)
    shapes = [(5 + i % 7, 20 + i % 11) for i in range(40)]
    spec = make_spec(tiny_target, make_conversations(tmp_path / "read", shapes), "transformers")
    expected = captured_by("transformers", tmp_path / "transformers", spec)
    # Killed by its 16th request, when up to 15 are computed or in flight.
    behave(monkeypatch, tmp_path, die_after=15, num_faulty_starts=1)
    assert captured_by("sglang", tmp_path / "sglang", spec) == expected
    check_same(tmp_path / "sglang", tmp_path / "transformers")
    starts = [line for line in read_journal(tmp_path / "journal") if line["event"] == "start"]
    assert len(starts) == 2


@pytest.mark.slow
def test_a_killed_stage_goes_on_behind_its_finished_shards_and_leaves_nothing_in_memory(
    tmp_path: Path, tiny_target: ResolvedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(5 + i % 7, 20 + i % 11) for i in range(60)]
    spec = make_spec(tiny_target, make_conversations(tmp_path / "read", shapes), "sglang", tokens_per_shard=64)
    killed = tmp_path / "killed"
    killed.mkdir()
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    program = (
        "import sys; from pathlib import Path; from specforge_core.benchmark import server;"
        "from specforge_core.targets import handover; handover.MEMORY = Path(sys.argv.pop(1));"
        "server.SGLANG_MODULE = sys.argv.pop(1);"
        "from specforge_core.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, str(handover.MEMORY), MODULE]
    behave(monkeypatch, tmp_path, die_after=40)
    words = ["capture", "--spec", str(tmp_path / "spec.json"), "--out", str(killed)]
    stage = subprocess.Popen([*command, *words], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (killed / "index.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.killpg(stage.pid, signal.SIGKILL)
        stage.wait()
    finished = load_index(killed).shards
    assert 0 < len(finished) < 30
    assert list(handover.MEMORY.glob(f"{handover.PREFIX}*")), "a killed stage cannot remove its folder"
    behave(monkeypatch, tmp_path)
    facts = capture.main(spec, killed)
    assert load_index(killed).shards[: len(finished)] == finished
    assert facts == captured_by("transformers", tmp_path / "whole", spec)
    check_same(killed, tmp_path / "whole")


@pytest.mark.slow
def test_what_goes_wrong_inside_the_hook_ends_the_stage_with_its_message(
    tmp_path: Path, tiny_target_dir: Path, tiny_target: ResolvedTarget
) -> None:
    capped = tmp_path / "capped"
    capped.mkdir()
    for file in tiny_target_dir.iterdir():
        (capped / file.name).write_bytes(file.read_bytes())
    config = json.loads((capped / "config.json").read_text())
    (capped / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    target = tiny_target.model_copy(update={"model": str(capped)})
    spec = make_spec(target, make_conversations(tmp_path / "read", SHAPES), "sglang")
    with pytest.raises(HookError, match=r"the target caps its logits at 30.0: drafts cannot do that"):
        capture.main(spec, tmp_path)


def test_a_document_that_the_server_would_refuse_is_refused_before_any_work(
    tmp_path: Path, tiny_target: ResolvedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, tmp_path, answers="scripted")
    # The tiny target has a context of 512 tokens, of which the server keeps 6.
    spec = make_spec(tiny_target, make_conversations(tmp_path / "read", [(500, 30), (5, 5)]), "sglang")
    with pytest.raises(ValueError, match=r"the longest document has 506 tokens, the server takes less than 506"):
        capture.main(spec.model_copy(update={"max_document_tokens": 506}), tmp_path)
    assert [line["event"] for line in read_journal(tmp_path / "journal")] == ["start"]


def test_servers_of_others_are_refused_because_they_have_no_hook(tmp_path: Path, tiny_target: ResolvedTarget) -> None:
    spec = make_spec(tiny_target, make_conversations(tmp_path / "read", SHAPES), "sglang")
    engine = UnmeasuredEngine(name="sglang", urls=("http://127.0.0.1:1",))
    with pytest.raises(ValueError, match="leave the URLs out"):
        capture.main(spec.model_copy(update={"engine": engine}), tmp_path)
