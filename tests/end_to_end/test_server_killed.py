"""A stage whose SGLang server is killed (kill -9) in the middle finishes with the result of an undisturbed one.

Real servers, one of each stage at once on one GPU, with the demo target enlarged a little. Set SPECBUNDLE_SGLANG_PYTHON
to the interpreter of an environment with SGLang.
"""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from specforge_core.artifacts import PROGRESS_DIRECTORY, SERVERS_DIRECTORY, seal
from specforge_core.benchmark.lossless import LosslessCheck
from specforge_core.data.conversations import load_conversations
from specforge_core.data.regenerate import JOURNAL_NAME
from specforge_core.data.shards import INDEX_NAME, Shard, load_index
from specforge_core.demo.inflate import Shape, inflate
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.engine import PYTHON_VARIABLE
from specforge_core.facts import BenchmarkResult, ServerRecord, ServingDraft
from specforge_core.manifest_sections import Eagle3Config, FeaturesConfig, ServingConfig
from specforge_core.stages import (
    BenchmarkSpec,
    CaptureSpec,
    RegenerateSpec,
    ResolvedBenchmark,
    ResolvedData,
    ResolvedSource,
    ResolvedSuite,
    ResolvedTarget,
    ServedEngine,
    StageSpec,
    UnmeasuredEngine,
)
from specforge_core.targets import CaptureRequest, GenerationRequest, Sampling
from specforge_core.targets.hf import HFTarget
from tests.targets.test_capture import make_conversations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} is not set"),
]

REPO_ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# KV rows of 8 heads of 64, for which a server has its kernels ready.
SHAPE = Shape(512, 16, 1024, 8, 8, 64, 2304)
NUM_PROMPTS = 48
NUM_TEST_PROMPTS = 12
MAX_NEW_TOKENS = 96
NUM_DOCUMENTS = 1500 if DEVICE == "cuda" else 60
DOCUMENT_SHAPE = (70, 90)
TOKENS_PER_SHARD = 16_384 if DEVICE == "cuda" else 2048
TREE = ServingConfig(num_steps=2, topk=2, num_draft_tokens=4)
DEADLINE_S = 500.0
POLL_S = 0.01
# Several servers share the GPU, and each would take half of what is free.
BOUNDED = """#!/bin/sh
case " $* " in
*" --help "*|*" --max-total-tokens "*) ;;
*" -m "*) set -- "$@" --max-total-tokens 32768 ;;
esac
exec "{python}" "$@"
"""


class Killed(NamedTuple):
    """A stage whose server was killed once, and that ended well."""

    out: Path
    num_restarts: dict[str, int]
    """By server."""

    @property
    def facts(self) -> dict[str, object]:
        facts: dict[str, object] = json.loads((self.out / "artifact.json").read_text())["facts"]
        return facts


def server_process(stage: psutil.Process, record: Path) -> psutil.Process:
    """The process that listens where the server of this record does."""
    command = ServerRecord.model_validate_json(record.read_text()).command
    assert command is not None
    port = command.rpartition("--port ")[2].split()[0]
    listening = [
        process
        for process in stage.children(recursive=True)
        if any(one.laddr.port == int(port) for one in process.net_connections(kind="tcp") if one.status == "LISTEN")
    ]
    assert len(listening) == 1, listening
    return listening[0]


def run_and_kill(spec: StageSpec, out: Path, server: str, is_in_the_middle: Callable[[Path], bool]) -> Killed:
    """The stage in a process of its own. Its server dies as soon as `is_in_the_middle` of the stage's folder."""
    out.mkdir(parents=True)
    spec_path = out.with_suffix(".json")
    spec_path.write_text(spec.model_dump_json())
    log = out.with_suffix(".log")
    record = out / SERVERS_DIRECTORY / f"{server}.json"
    command = [sys.executable, "-m", "specforge_core", spec.stage, "--spec", str(spec_path), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO_ROOT), os.environ.get("PYTHONPATH", "")])}
    deadline = time.monotonic() + DEADLINE_S
    with log.open("w") as output:
        stage = subprocess.Popen(command, cwd=REPO_ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not (record.exists() and is_in_the_middle(out)):
            assert stage.poll() is None, f"ended before its server was killed:\n{tail(log)}"
            assert time.monotonic() < deadline, f"nothing to see after {DEADLINE_S} s:\n{tail(log)}"
            time.sleep(POLL_S)
        server_process(psutil.Process(stage.pid), record).kill()
        status = stage.wait(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        stage.kill()
        stage.wait()
    assert status == 0, tail(log)
    records = {path.stem: ServerRecord.model_validate_json(path.read_text()) for path in record.parent.glob("*.json")}
    return Killed(out, {name: one.num_restarts for name, one in records.items()})


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def has_answers(out: Path) -> bool:
    """A quarter of the prompts are answered."""
    journal = out / PROGRESS_DIRECTORY / JOURNAL_NAME
    return journal.exists() and journal.read_bytes().count(b"\n") > NUM_PROMPTS // 4


def has_shards(out: Path) -> bool:
    """A shard is done, others are not."""
    return (out / INDEX_NAME).exists() and len(load_index(out).shards) > 0


def is_measuring(out: Path) -> bool:
    """The server with the draft has been ready for a moment."""
    record = out / SERVERS_DIRECTORY / "3-1-4-0.json"
    return time.time() - record.stat().st_mtime > 1.0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ResolvedTarget:
    folder = tmp_path_factory.mktemp("target") / "enlarged"
    inflate(SHAPE, folder, dtype=torch.bfloat16)
    return ResolvedTarget(model=str(folder), content_id="enlarged", dtype="bfloat16")


@pytest.fixture(scope="module")
def loaded(target: ResolvedTarget) -> HFTarget:
    return HFTarget(target, device=DEVICE)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("documents") / "artifact", [DOCUMENT_SHAPE] * NUM_DOCUMENTS)


@pytest.fixture(scope="module")
def draft(target: ResolvedTarget, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained: its tokens are nearly never accepted, and the text is the target's all the same."""
    folder = tmp_path_factory.mktemp("draft")
    torch.manual_seed(0)
    in_process = HFTarget(target, device="cpu")
    made = Eagle3Draft.create(
        Eagle3Config(num_steps=3, draft_vocab_size=512),
        in_process.config.to_dict(),
        in_process.load_target_head(),
        torch.arange(512),
        Eagle3Draft.capture_layers(None, in_process.num_layers),
    )
    (folder / "config.json").write_text(json.dumps(made.serving_config()))
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in made.serving_state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    facts = ServingDraft(architecture="LlamaForCausalLMEagle3", num_parameters=1, max_reload_error=0.0)
    seal(folder, facts, stage="export", key="0" * 20, inputs={}, elapsed_s=0.0)
    return folder


@pytest.fixture(scope="module")
def killed(
    target: ResolvedTarget, documents: Path, draft: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Killed]:
    """All three stages, at once: a server takes a minute to start, and the GPU has room for all."""
    folder = tmp_path_factory.mktemp("stages")
    python = folder / "python"
    python.write_text(BOUNDED.format(python=os.environ[PYTHON_VARIABLE]))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    engine = {"name": "sglang", "python": str(python), "max_running_requests": 4, "mem_fraction_static": 0.5}
    prompts = ResolvedSource(dataset="builtin:demo", config="arithmetic", content_id="demo", limit=NUM_PROMPTS)
    held_out = prompts.model_copy(update={"split": "heldout", "limit": NUM_TEST_PROMPTS})
    suite = ResolvedSuite(name="arithmetic", source=held_out, max_new_tokens=MAX_NEW_TOKENS)
    runs = {
        "regenerate": (
            RegenerateSpec(
                target=target,
                engine=UnmeasuredEngine(**engine),
                data=ResolvedData(sources=(prompts,), max_prompt_tokens=256, max_new_tokens=MAX_NEW_TOKENS),
                device=DEVICE,
            ),
            "target-0",
            has_answers,
        ),
        "capture": (
            CaptureSpec(
                target=target,
                engine=UnmeasuredEngine(**engine),
                conversations=documents,
                algorithm="eagle3",
                aux_layers=None,
                features=FeaturesConfig(tokens_per_shard=TOKENS_PER_SHARD),
                max_document_tokens=sum(DOCUMENT_SHAPE),
                batch_tokens=512,
                device=DEVICE,
            ),
            "capture-0",
            has_shards,
        ),
        "benchmark": (
            BenchmarkSpec(
                target=target,
                engine=ServedEngine(**engine),
                draft=draft,
                conversations=documents,
                benchmark=ResolvedBenchmark(suites=(suite,), serving=(ServingConfig(), TREE), repeats=2),
                hardware="any",
                device=DEVICE,
            ),
            "3-1-4-0",
            is_measuring,
        ),
    }
    with ThreadPoolExecutor(len(runs)) as pool:
        started = {
            stage: pool.submit(run_and_kill, spec, folder / stage, server, is_in_the_middle)
            for stage, (spec, server, is_in_the_middle) in runs.items()
        }
    return {stage: run.result() for stage, run in started.items()}


def test_regenerated_conversations_are_those_of_the_target(
    killed: dict[str, Killed], target: ResolvedTarget, loaded: HFTarget
) -> None:
    stage = killed["regenerate"]
    assert stage.num_restarts == {"target-0": 1}
    rows = load_conversations(stage.out)
    assert len(set(rows["id"])) == len(rows) == NUM_PROMPTS
    split = [row["loss_mask"].index(True) for row in rows]
    prompts = [row["input_ids"][:start] for row, start in zip(rows, split, strict=True)]
    requests = [GenerationRequest(str(i), prompt) for i, prompt in enumerate(prompts)]
    expected = {
        int(completion.id): completion.token_ids
        for completion in loaded.generate(requests, Sampling(MAX_NEW_TOKENS), batch_size=NUM_PROMPTS)
    }
    check = LosslessCheck(target, device=DEVICE)
    verdicts = [
        check.verdict(prompt, expected[i], row["input_ids"][start:])
        for i, (row, start, prompt) in enumerate(zip(rows, split, prompts, strict=True))
    ]
    # A server's batches and this process's round differently; beyond that nothing may differ.
    assert verdicts.count("different") == 0, verdicts
    assert verdicts.count("identical") >= 0.8 * NUM_PROMPTS, verdicts


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def test_captured_features_are_those_of_the_target(
    killed: dict[str, Killed], target: ResolvedTarget, documents: Path, loaded: HFTarget
) -> None:
    stage = killed["capture"]
    assert stage.num_restarts == {"capture-0": 1}
    rows = load_conversations(documents)
    stored = [
        (name, shard.read(i, length))
        for record in load_index(stage.out).shards
        for shard in [Shard(stage.out / record.name)]
        for i, (name, length) in enumerate(zip(shard.document_ids, shard.lengths, strict=True))
    ]
    assert [name for name, _ in stored] == rows["id"]
    assert all(document.input_ids.tolist() == row["input_ids"] for (_, document), row in zip(stored, rows, strict=True))
    exact = HFTarget(target.model_copy(update={"dtype": "float32"}), device=DEVICE)
    layers = load_index(stage.out).layers
    sample = [document for _, document in stored][:: len(stored) // 20]
    teaching_T = torch.tensor([False] * (DOCUMENT_SHAPE[0] - 1) + [True] * DOCUMENT_SHAPE[1] + [False])
    requests = [CaptureRequest(document.input_ids.long(), teaching_T) for document in sample]
    references = exact.capture(requests, layers, batch_tokens=4096)
    in_bfloat16 = loaded.capture(requests, layers, batch_tokens=4096)
    num_same = num_tokens = 0
    for document, reference, rounded in zip(sample, references, in_bfloat16, strict=True):
        for found, alike, true in (
            (document.aux_hidden, rounded.aux_hidden_TLD, reference.aux_hidden_TLD),
            (document.last_hidden, rounded.last_hidden_UD, reference.last_hidden_UD),
        ):
            # The error budget: twice what bfloat16 costs in this process.
            assert relative_error(found, true.cpu()) <= 2 * relative_error(alike.cpu(), true.cpu())
        num_same += int((document.target_argmax == reference.argmax_U.cpu()).sum())
        num_tokens += len(document.target_argmax)
    assert num_same >= 0.97 * num_tokens


def test_the_benchmark_is_complete(killed: dict[str, Killed]) -> None:
    stage = killed["benchmark"]
    result = BenchmarkResult.model_validate(stage.facts)
    assert stage.num_restarts == {"baseline-0": 0, "3-1-4-0": 1, "2-2-4-0": 0}
    assert {name: one.num_restarts for name, one in result.servers.items()} == {"baseline": 0, "3-1-4": 1, "2-2-4": 0}
    assert [measurement.serving.chain() for measurement in result.measurements] == ["3-1-4", "2-2-4"]
    for measurement in result.measurements:
        assert measurement.num_prompts == NUM_TEST_PROMPTS
        assert len(measurement.output_tokens_per_s) == len(measurement.baseline_output_tokens_per_s) == 2
        assert measurement.lossless is not None
        assert measurement.lossless.num_different == 0
        assert measurement.lossless.num_identical + measurement.lossless.num_near_tie == NUM_TEST_PROMPTS
