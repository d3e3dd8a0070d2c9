"""A whole factory in a folder, small enough for seconds: a tiny real target, prompts in a file, a manifest."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests import tiny

SUBJECTS = ("rivers", "bridges", "clocks", "lamps", "ferries", "maps", "kites", "wells")


def write_prompts(path: Path, *, verb: str, count: int) -> None:
    """One conversation a line, as OpenAI messages."""
    questions = [f"{verb} {number} {SUBJECTS[number % len(SUBJECTS)]}." for number in range(count)]
    rows = [json.dumps({"messages": [{"role": "user", "content": question}]}) for question in questions]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def tiny_entry(name: str = "tiny") -> dict[str, Any]:
    """An entry as it stands in a manifest. Its gates pass whatever a draft of random weights can do."""
    return {
        "name": name,
        "target": {"model": "target", "dtype": "float32"},
        "engine": {"name": "transformers"},
        "draft": {"num_steps": 3, "draft_vocab_size": 64},
        "data": {"sources": [{"dataset": "train.jsonl"}], "max_prompt_tokens": 64, "max_new_tokens": 24},
        "training": {
            "tokens_per_batch": 256,
            "tokens_per_micro_batch": 256,
            "max_document_tokens": 128,
            "learning_rate": 1e-3,
            "eval_fraction": 0.2,
            "evals_per_run": 1,
            "checkpoints_per_run": 1,
        },
        "benchmark": {
            "suites": [{"name": "held-out", "source": {"dataset": "test.jsonl"}, "max_new_tokens": 16}],
            "repeats": 2,
        },
        "gates": {"min_speedup": 0.0, "lossless": True},
        "resources": {"num_gpus": 0},
    }


def gpu_entry(name: str, num_gpus: int) -> dict[str, Any]:
    """The tiny entry, for a host with GPUs; one micro-batch each."""
    entry = tiny_entry(name)
    training = entry["training"] | {"tokens_per_batch": 256 * num_gpus}
    return entry | {"training": training, "resources": {"num_gpus": num_gpus}}


def served_entry(name: str) -> dict[str, Any]:
    """The tiny entry, for a host with a GPU and SGLang."""
    return gpu_entry(name, 1) | {"target": {"model": "target"}, "engine": {"name": "sglang"}}


def make_factory(directory: Path, *entries: dict[str, Any]) -> Path:
    """The manifest's path; without entries it holds the tiny one."""
    tiny.make_target(directory / "target")
    write_prompts(directory / "train.jsonl", verb="Count", count=24)
    write_prompts(directory / "test.jsonl", verb="Draw", count=3)
    manifest = directory / "bundle_manifest.yaml"
    content = {"version": 1, "entries": list(entries) or [tiny_entry()]}
    manifest.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return manifest
