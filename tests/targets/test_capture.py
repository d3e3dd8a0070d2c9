import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from specforge_core.__main__ import main as stage
from specforge_core.artifacts import load_artifact, seal
from specforge_core.data.conversations import Conversation, write_conversations
from specforge_core.data.loader import FeatureSet
from specforge_core.data.shards import Shard, load_index, load_target_config, load_target_head
from specforge_core.facts import Conversations, HiddenStates
from specforge_core.manifest_sections import FeaturesConfig
from specforge_core.stages import CaptureSpec, ResolvedTarget
from specforge_core.targets import capture
from tests.data.feature_files import damaged_shards

LAYERS = (1, 3, 4)
"""[1, N//2 - 1, N - 4] of 8 layers."""


def make_conversations(directory: Path, shapes: list[tuple[int, int]]) -> Path:
    """A conversations artifact; a shape is (prompt tokens, answer tokens)."""
    generator = torch.Generator().manual_seed(0)
    directory.mkdir()
    rows = [
        Conversation(
            id=f"conversation-{i}",
            source="test",
            messages=(),
            input_ids=tuple(torch.randint(0, 259, (prompt + answer,), generator=generator).tolist()),
            loss_mask=(False,) * prompt + (True,) * answer,
            finish_reasons=("stop",),
        )
        for i, (prompt, answer) in enumerate(shapes)
    ]
    write_conversations(directory, rows)
    facts = Conversations(
        num_conversations=len(rows),
        num_tokens=sum(map(sum, shapes)),
        num_loss_tokens=sum(answer for _, answer in shapes),
        num_failed=0,
        num_cut_off=0,
        chat_template_sha256="0" * 64,
    )
    seal(directory, facts, stage="regenerate", key="0" * 20, inputs={}, elapsed_s=0.0)
    return directory


def make_spec(target: ResolvedTarget, conversations: Path, *, max_document_tokens: int = 100) -> CaptureSpec:
    return CaptureSpec(
        target=target,
        conversations=conversations,
        algorithm="eagle3",
        aux_layers=None,
        features=FeaturesConfig(dtype="float32", tokens_per_shard=64),
        max_document_tokens=max_document_tokens,
        batch_tokens=64,
    )


def made(directory: Path) -> Path:
    """The directory, empty."""
    directory.mkdir()
    return directory


def test_captured_features_are_those_of_a_plain_run(tmp_path: Path, tiny_target: ResolvedTarget):
    spec = make_spec(tiny_target, make_conversations(tmp_path / "conversations", [(10, 20), (5, 30), (40, 50)]))
    facts = capture.main(spec, tmp_path)
    # 30 + 35 tokens are one too many for a shard of 64.
    assert (facts.layers, facts.num_target_layers, facts.hidden_size, facts.dtype) == (LAYERS, 8, 64, "float32")
    assert (facts.num_documents, facts.num_tokens, facts.num_loss_tokens, facts.num_shards) == (3, 155, 100, 3)
    model = AutoModelForCausalLM.from_pretrained(tiny_target.model, dtype=torch.float64)
    for i, (prompt, answer) in enumerate([(10, 20), (5, 30), (40, 50)]):
        shard = Shard(tmp_path / f"shard-{i:05d}.safetensors")
        assert shard.document_ids == [f"conversation-{i}"]
        stored = shard.read(0, prompt + answer)
        assert stored.loss_mask.tolist() == [False] * prompt + [True] * answer
        with torch.no_grad():
            output = model(stored.input_ids.long()[None], output_hidden_states=True)
        for j, layer in enumerate(LAYERS):
            exact_TD = output.hidden_states[layer + 1][0]
            torch.testing.assert_close(stored.aux_hidden[:, j].double(), exact_TD, rtol=1e-4, atol=1e-4)
        # The last token of the prompt teaches, and every one of the answer but the last.
        exact_UD, logits_UV = output.hidden_states[-1][0, prompt - 1 : -1], output.logits[0, prompt - 1 : -1]
        torch.testing.assert_close(stored.last_hidden.double(), exact_UD, rtol=1e-4, atol=1e-4)
        assert stored.target_argmax.tolist() == logits_UV.argmax(-1).tolist()
        torch.testing.assert_close(stored.target_logsumexp.double(), logits_UV.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_shards_are_sealed_by_the_sha256_that_they_were_written_with(tmp_path: Path, tiny_target: ResolvedTarget):
    conversations = make_conversations(tmp_path / "conversations", [(3, 5), (40, 50)])
    spec, out = make_spec(tiny_target, conversations), tmp_path / "out"
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    assert stage(["capture", "--spec", str(tmp_path / "spec.json"), "--out", str(out)]) == 0
    shards = [f"shard-0000{i}.safetensors" for i in range(2)]
    known = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in shards}
    assert capture.known_sha256(out) == known
    sealed = load_artifact(out, HiddenStates).files
    assert {name: sealed[name].sha256 for name in shards} == known
    assert {"index.json", "config.json", "target_head.safetensors"} <= set(sealed)
    (out / shards[1]).write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"shard-00001.safetensors has 3 bytes"):
        capture.known_sha256(out)


def test_only_what_is_held_out_of_training_is_captured_where_features_are_live(
    tmp_path: Path, tiny_target: ResolvedTarget
):
    conversations = make_conversations(tmp_path / "conversations", [(2 + i, 4) for i in range(30)])
    spec = make_spec(tiny_target, conversations)
    for name, fraction in (("all", None), ("held out", 0.3)):
        (tmp_path / name).mkdir()
        capture.main(spec.model_copy(update={"held_out_fraction": fraction}), tmp_path / name)
    whole, part = FeatureSet(tmp_path / "all"), FeatureSet(tmp_path / "held out")
    held_out = whole.split(0.3).eval
    assert 0 < len(held_out) < 30
    assert part.document_ids == [whole.document_ids[i] for i in held_out]
    assert part.lengths == [whole.lengths[i] for i in held_out]


def test_features_can_be_captured_in_float8(tmp_path: Path, tiny_target: ResolvedTarget):
    conversations = make_conversations(tmp_path / "conversations", [(10, 20), (5, 30)])
    spec = make_spec(tiny_target, conversations)
    facts = {}
    for dtype in ("float32", "float8"):
        (tmp_path / dtype).mkdir()
        features = spec.features.model_copy(update={"dtype": dtype})
        facts[dtype] = capture.main(spec.model_copy(update={"features": features}), tmp_path / dtype)
    assert facts["float8"] == facts["float32"].model_copy(update={"dtype": "float8"})
    exact, stored = (Shard(tmp_path / dtype / "shard-00000.safetensors").read(0, 30) for dtype in facts)
    assert stored.aux_scale is not None
    assert stored.last_scale is not None
    for values, scale, vectors in (
        (stored.aux_hidden, stored.aux_scale, exact.aux_hidden),
        (stored.last_hidden, stored.last_scale, exact.last_hidden),
    ):
        # The largest element of each vector becomes 448; an element is off by a sixteenth, or by 2^-10 of the scale.
        torch.testing.assert_close(scale, vectors.abs().amax(-1) / 448)
        error = (values.float() * scale.unsqueeze(-1) - vectors).abs()
        assert (error <= torch.maximum(vectors.abs() / 16, scale.unsqueeze(-1) / 2**10) * (1 + 1e-5)).all()


def test_training_needs_no_target_weights_beside_the_artifact(tmp_path: Path, tiny_target: ResolvedTarget):
    capture.main(make_spec(tiny_target, make_conversations(tmp_path / "conversations", [(3, 3)])), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_target.model, dtype=torch.float32)
    head = load_target_head(tmp_path)
    assert torch.equal(head.embedding_VD, model.model.embed_tokens.weight)
    assert torch.equal(head.lm_head_VD, model.lm_head.weight)
    assert head.final_norm_D is not None
    assert torch.equal(head.final_norm_D, model.model.norm.weight)
    config = load_target_config(tmp_path)
    assert config == json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in ("model_type", "hidden_size", "vocab_size", "rms_norm_eps")} == {
        "model_type": "llama",
        "hidden_size": 64,
        "vocab_size": 259,
        "rms_norm_eps": 1e-6,
    }
    # The same target in another place must give the same artifact.
    assert tiny_target.model not in (tmp_path / "config.json").read_text()


def test_long_documents_are_cut_and_those_without_an_answer_left_out(
    tmp_path: Path, tiny_target: ResolvedTarget, caplog: pytest.LogCaptureFixture
):
    # After 20 tokens: all of the first, 20 - 15 answers of the second, no answer of the third; the fourth has none.
    conversations = make_conversations(tmp_path / "conversations", [(4, 6), (15, 25), (20, 5), (7, 0), (1, 1)])
    with caplog.at_level(logging.INFO):
        facts = capture.main(make_spec(tiny_target, conversations, max_document_tokens=20), tmp_path)
    assert (facts.num_documents, facts.num_tokens, facts.num_loss_tokens) == (3, 10 + 20 + 2, 6 + 5 + 1)
    assert Shard(tmp_path / "shard-00000.safetensors").document_ids == [f"conversation-{i}" for i in (0, 1, 4)]
    assert "2 conversations cut at 20 tokens (25 tokens lost), 2 left out without an answer" in caplog.text


def test_conversations_without_any_answer_are_refused(tmp_path: Path, tiny_target: ResolvedTarget):
    conversations = make_conversations(tmp_path / "conversations", [(30, 5), (7, 0)])
    with pytest.raises(ValueError, match=r"none of 2 conversations has an answer in its first 20 tokens"):
        capture.main(make_spec(tiny_target, conversations, max_document_tokens=20), tmp_path)


class Usage(NamedTuple):
    free: int


def test_features_that_the_disk_has_no_room_for_are_refused_before_the_first(
    tmp_path: Path, tiny_target: ResolvedTarget, monkeypatch: pytest.MonkeyPatch
):
    spec = make_spec(tiny_target, make_conversations(tmp_path / "conversations", [(10, 20), (5, 30)]))
    # 65 tokens of three layers of 64 float32, an id and a flag; 50 that teach, of one such layer and two numbers.
    needed = 65 * (3 * 64 * 4 + 5) + 50 * (64 * 4 + 8)
    assert needed == 63445
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed - 1))
    with pytest.raises(ValueError, match=r"need 63\.4 kB.* 63\.4 kB are free where .*/none") as caught:
        capture.main(spec, made(tmp_path / "none"))
    for way in ("--store", "features.dtype: float8", "features.mode: live", "data.sources.limit"):
        assert way in str(caught.value)
    assert not list((tmp_path / "none").glob("*shard*"))
    # Where training captures for itself only what it is tested on is stored, and what is float8 already stays so.
    features = spec.features.model_copy(update={"dtype": "float8"})
    live = spec.model_copy(update={"features": features, "held_out_fraction": 0.99})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0))
    with pytest.raises(ValueError, match="are free where") as caught:
        capture.main(live, made(tmp_path / "live"))
    assert "float8" not in str(caught.value)
    assert "mode: live" not in str(caught.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed))
    assert capture.main(spec, made(tmp_path / "all")).num_tokens == 65


def test_what_an_interrupted_capture_has_written_needs_no_room(
    tmp_path: Path, tiny_target: ResolvedTarget, monkeypatch: pytest.MonkeyPatch
):
    spec, out = make_spec(tiny_target, make_conversations(tmp_path / "conversations", [(10, 20), (5, 40)])), tmp_path
    facts = capture.main(spec, out)
    index = load_index(out)
    assert len(index.shards) == 2

    def interrupt() -> Path:
        """As if the second shard had been cut short; returns what there is of it."""
        (out / "index.json").write_text(index.model_copy(update={"shards": index.shards[:1]}).model_dump_json())
        return (out / "shard-00001.safetensors").rename(out / ".shard-00001.safetensors.partial")

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0))
    interrupt()
    assert capture.main(spec, out) == facts
    interrupt().unlink()
    # 45 tokens, 40 that teach.
    with pytest.raises(ValueError, match=r"need 45\.3 kB"):
        capture.main(spec, out)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, tiny_target: ResolvedTarget
):
    conversations = make_conversations(tmp_path / "conversations", [(5 + i % 7, 20 + i % 11) for i in range(80)])
    spec = make_spec(tiny_target, conversations)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "specforge_core", "capture", "--spec", str(tmp_path / "spec.json"), "--out"]
    # Sums over threads: as many of them here as there.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen([*command, str(killed)], env=environment)
    while not (killed / "shard-00002.safetensors").exists():
        assert child.poll() is None, "capture ended before it could be killed"
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    facts = capture.main(spec, undisturbed)
    finished = load_index(killed).shards
    assert 0 < len(finished) < facts.num_shards
    written_at = (killed / finished[0].name).stat().st_mtime_ns

    subprocess.run([*command, str(killed)], env=environment, check=True)
    assert (killed / finished[0].name).stat().st_mtime_ns == written_at
    artifact = load_artifact(killed, type(facts))
    assert artifact.facts == facts
    assert damaged_shards(killed) == []
    names = {path.name for path in undisturbed.iterdir()}
    assert names | {"artifact.json"} == {path.name for path in killed.iterdir()}
    for name in names:
        assert (undisturbed / name).read_bytes() == (killed / name).read_bytes(), name
