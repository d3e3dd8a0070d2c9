"""What a manifest names, pinned: local content, and the Hub through its real client against a local server."""

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from specforge_core import resolve
from specforge_core.manifest import Manifest
from specforge_core.manifest_sections import BenchmarkConfig, DataConfig, PromptSource, SuiteConfig, TargetConfig
from specforge_core.resolve import pin, resolve_benchmark, resolve_data, resolve_source, resolve_target
from tests.hub_like.server import Hub

# All digits and one "e": unquoted, YAML takes it for a number.
MODEL_COMMIT = "1234567890123456789e01234567890123456789"
DATA_COMMIT = "0" * 39 + "d"
OLD_COMMIT = "f" * 40
QUESTIONS = (
    "GET /api/models/org/model/revision/main",
    "GET /api/models/org/model/revision/dev",
    "GET /api/datasets/org/data/revision/main",
)


@pytest.fixture
def hub(hub_server: Hub) -> Hub:
    """Has a model with two branches, and a data set."""
    storage = hub_server.storage
    model, data = storage.create("model", "org/model"), storage.create("dataset", "org/data")
    weights = {"model.safetensors": storage.regular_file(b"weights")}
    storage.add_commit(model, weights, title="new", oid=MODEL_COMMIT)
    storage.add_commit(model, weights, title="old", branch="dev", oid=OLD_COMMIT)
    storage.add_commit(data, {}, title="data", oid=DATA_COMMIT)
    return hub_server


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def offline() -> HfApi:
    # Port 9 is "discard": nothing listens there.
    return HfApi(endpoint="http://127.0.0.1:9", token=False)


def make_target(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(name)
    return folder


def test_a_local_target_is_the_digest_of_the_files_that_matter(tmp_path: Path) -> None:
    folder = make_target(tmp_path / "target")
    target = resolve_target(TargetConfig(model="target", dtype="float32"), tmp_path)
    assert (target.model, target.revision, target.dtype) == (str(folder), None, "float32")

    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in os.listdir(folder)}
    text = json.dumps(hashes, sort_keys=True, separators=(",", ":"))
    assert target.content_id == hashlib.sha256(text.encode()).hexdigest()[:20]

    (folder / "README.md").write_text("says nothing to the model")
    assert resolve_target(TargetConfig(model="./target"), tmp_path).content_id == target.content_id
    (folder / "chat_template.jinja").write_text("another prompt")
    assert resolve_target(TargetConfig(model="./target"), tmp_path).content_id != target.content_id


def test_a_moved_target_keeps_its_content_id(tmp_path: Path) -> None:
    before = resolve_target(TargetConfig(model=str(make_target(tmp_path / "old"))), tmp_path)
    (tmp_path / "old").rename(tmp_path / "new")
    after = resolve_target(TargetConfig(model=str(tmp_path / "new")), tmp_path)
    assert (before.content_id, before.model) != (after.content_id, after.model)
    assert before.content_id == after.content_id


def test_a_large_file_is_read_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_target(tmp_path / "target")
    monkeypatch.setattr(resolve, "LARGE_FILE_BYTES", 1)
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))

    def content_id() -> str:
        return resolve_target(TargetConfig(model="target"), tmp_path, hash_cache=tmp_path / "hashes").content_id

    first = content_id()
    assert first == resolve_target(TargetConfig(model="target"), tmp_path).content_id
    # Same size and time, so the remembered digest stands for it: shown by bytes that were not read.
    weights.write_text(weights.read_text().upper())
    os.utime(weights, ns=(1, 1))
    assert content_id() == first
    os.utime(weights, ns=(2, 2))
    assert content_id() != first


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"is no model folder: it has no config\.json"),
        (["config.json"], "holds no weights; save it as safetensors"),
        (
            ["config.json", "pytorch_model.bin"],
            r"only pickled weights, which run code when they are read \(pytorch_model.bin\)",
        ),
    ],
)
def test_a_folder_without_safetensors_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    (tmp_path / "target").mkdir()
    for name in files:
        (tmp_path / "target" / name).write_text("x")
    with pytest.raises(ValueError, match=message):
        resolve_target(TargetConfig(model="target"), tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["config.json", "pytorch_model.bin"],
            r"target org/model on the Hub holds only pickled weights, .*_model\.bin",
        ),
        (["README.md"], "target org/model on the Hub holds no weights"),
        (["config.json", "pytorch_model.bin", "model-00001-of-00002.safetensors"], None),
    ],
)
def test_a_hub_target_without_safetensors_is_refused_with_the_way_out(
    tmp_path: Path, hub: Hub, api: HfApi, files: list[str], message: str | None
) -> None:
    storage = hub.storage
    model, content = storage.repositories["model", "org/model"], storage.regular_file(b"x")
    storage.add_commit(model, dict.fromkeys(files, content), title="other files", oid=MODEL_COMMIT)
    if message is None:
        assert resolve_target(TargetConfig(model="org/model"), tmp_path, api=api).revision == MODEL_COMMIT
        return
    with pytest.raises(ValueError, match=f"{message}.*; save it as safetensors with `save_pretrained` and name that"):
        resolve_target(TargetConfig(model="org/model"), tmp_path, api=api)


def test_a_commit_does_not_make_a_hub_id_of_any_name(tmp_path: Path) -> None:
    for name in ("org/../../etc", "just-a-name", "org/name/more"):
        with pytest.raises(ValueError, match="and no Hub id"):
            resolve_target(TargetConfig(model=name, revision=OLD_COMMIT), tmp_path)
        with pytest.raises(ValueError, match="and no Hub id"):
            resolve_source(PromptSource(dataset=name, revision=OLD_COMMIT), tmp_path)


def test_a_revision_of_a_path_is_refused(tmp_path: Path) -> None:
    make_target(tmp_path / "target")
    with pytest.raises(ValueError, match='"target" is a path and has no revision "main"'):
        resolve_target(TargetConfig(model="target", revision="main"), tmp_path)


def test_a_commit_needs_no_network(tmp_path: Path, offline: HfApi) -> None:
    target = resolve_target(TargetConfig(model="org/model", revision=OLD_COMMIT), tmp_path, api=offline)
    assert (target.model, target.revision, target.content_id) == ("org/model", OLD_COMMIT, OLD_COMMIT)


def test_a_branch_becomes_its_commit_with_a_warning(
    tmp_path: Path, api: HfApi, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        target = resolve_target(TargetConfig(model="org/model", revision="dev"), tmp_path, api=api)
    assert (target.revision, target.content_id) == (OLD_COMMIT, OLD_COMMIT)
    assert f"model org/model: branch dev is commit {OLD_COMMIT}" in caplog.text
    assert "specbundle pin" in caplog.text
    source = resolve_source(PromptSource(dataset="org/data", config="c"), tmp_path, api=api)
    assert (source.dataset, source.revision, source.content_id) == ("org/data", DATA_COMMIT, DATA_COMMIT)


def test_a_name_that_is_nothing_names_both_readings(tmp_path: Path, api: HfApi, offline: HfApi) -> None:
    with pytest.raises(ValueError, match=r"is no path \(.*/target does not exist\) and no Hub id"):
        resolve_target(TargetConfig(model="target"), tmp_path, api=offline)
    with pytest.raises(ValueError, match=r"is no path .* and the Hub shows no model of that name; if .* HF_TOKEN"):
        resolve_target(TargetConfig(model="org/unknown"), tmp_path, api=api)
    with pytest.raises(ValueError, match='model org/model on the Hub has no revision "v9"'):
        resolve_target(TargetConfig(model="org/model", revision="v9"), tmp_path, api=api)
    with pytest.raises(ConnectionError, match=r"is no path .* cannot be asked .* a commit needs no network"):
        resolve_target(TargetConfig(model="org/model"), tmp_path, api=offline)
    with pytest.raises(ValueError, match=r"is no model folder"):
        resolve_target(TargetConfig(model="./org/model"), tmp_path, api=offline)
    with pytest.raises(ValueError, match=r"gone\.jsonl is no file"):
        resolve_source(PromptSource(dataset="gone.jsonl"), tmp_path, api=offline)


def test_a_local_file_of_prompts_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    source = resolve_source(PromptSource(dataset="prompts.jsonl", limit=3), tmp_path)
    assert (source.dataset, source.limit) == (str(tmp_path / "prompts.jsonl"), 3)
    assert source.content_id == hashlib.sha256(b"{}\n").hexdigest()


def test_the_built_in_prompts_are_pinned_by_the_program_that_writes_them(tmp_path: Path) -> None:
    train = resolve_source(PromptSource(dataset="builtin:demo", split="train"), tmp_path)
    heldout = resolve_source(PromptSource(dataset="builtin:demo", split="heldout", config="table"), tmp_path)
    assert train.content_id == heldout.content_id
    with pytest.raises(ValueError, match='builtin:demo has no split "test"; it has train, heldout'):
        resolve_source(PromptSource(dataset="builtin:demo", split="test"), tmp_path)
    with pytest.raises(ValueError, match='builtin:demo has no config "tables"; it has arithmetic, '):
        resolve_source(PromptSource(dataset="builtin:demo", config="tables"), tmp_path)


def test_every_source_and_suite_of_a_config_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("a")
    a = PromptSource(dataset="a.jsonl")
    demo = PromptSource(dataset="builtin:demo")
    data = resolve_data(DataConfig(sources=(a, demo), seed=7), tmp_path)
    assert data.seed == 7
    assert [source.content_id for source in data.sources] == [
        resolve_source(a, tmp_path).content_id,
        resolve_source(demo, tmp_path).content_id,
    ]
    benchmark = resolve_benchmark(
        BenchmarkConfig(suites=(SuiteConfig(name="s", source=a, max_new_tokens=9),), repeats=5), tmp_path
    )
    assert (benchmark.repeats, benchmark.suites[0].max_new_tokens) == (5, 9)
    assert benchmark.suites[0].source.content_id == hashlib.sha256(b"a").hexdigest()


MANIFEST = """\
# Keep me.
version: 1
defaults:
  data:
    sources:
      - dataset: org/data   # the large one
        limit: 3
      - {dataset: builtin:demo}
      - {dataset: local.jsonl}
  benchmark:
    suites:
      - name: s
        source: {dataset: org/data, split: test}  # flow style
entries:
  - name: one
    target:
      dtype: float16
      model:   org/model

  - name: two
    target: {model: 'org/model', revision: dev}   # a branch
  - name: three
    target:
      revision: ffffffffffffffffffffffffffffffffffffffff
      model: org/model
  - name: four
    target:
      model: org/model
      revision:  # to be filled
  - name: five
    target: {model: ./local}"""

PINNED = f"""\
# Keep me.
version: 1
defaults:
  data:
    sources:
      - dataset: org/data   # the large one
        revision: "{DATA_COMMIT}"
        limit: 3
      - {{dataset: builtin:demo}}
      - {{dataset: local.jsonl}}
  benchmark:
    suites:
      - name: s
        source: {{dataset: org/data, revision: "{DATA_COMMIT}", split: test}}  # flow style
entries:
  - name: one
    target:
      dtype: float16
      model:   org/model
      revision: "{MODEL_COMMIT}"

  - name: two
    target: {{model: 'org/model', revision: "{OLD_COMMIT}"}}   # a branch
  - name: three
    target:
      revision: ffffffffffffffffffffffffffffffffffffffff
      model: org/model
  - name: four
    target:
      model: org/model
      revision: "{MODEL_COMMIT}"  # to be filled
  - name: five
    target: {{model: ./local}}"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_pin_writes_commits_and_leaves_everything_else(tmp_path: Path, hub: Hub, api: HfApi, newline: str) -> None:
    path = tmp_path / "bundle_manifest.yaml"
    path.write_bytes(MANIFEST.replace("\n", newline).encode())
    changes = pin(path, api=api)
    assert path.read_bytes().decode() == PINNED.replace("\n", newline)
    assert changes == [
        f"line 6: org/data: main is now {DATA_COMMIT}",
        f"line 13: org/data: main is now {DATA_COMMIT}",
        f"line 18: org/model: main is now {MODEL_COMMIT}",
        f"line 21: org/model: dev is now {OLD_COMMIT}",
        f"line 28: org/model: main is now {MODEL_COMMIT}",
    ]
    # PyYAML's own reader agrees, and each question was asked once.
    assert yaml.safe_load(path.read_text())["entries"][0]["target"]["revision"] == MODEL_COMMIT
    assert sorted(hub.calls) == sorted(QUESTIONS)

    assert pin(path, api=api) == []
    assert path.read_bytes().decode() == PINNED.replace("\n", newline)
    assert len(hub.calls) == len(QUESTIONS)
    assert Manifest.load(path).entries[0].target.revision == MODEL_COMMIT


def test_pin_writes_nothing_if_one_question_has_no_answer(tmp_path: Path, api: HfApi) -> None:
    path = tmp_path / "bundle_manifest.yaml"
    text = MANIFEST.replace("model: ./local", "model: org/unknown")
    path.write_text(text)
    with pytest.raises(ValueError, match="org/unknown"):
        pin(path, api=api)
    assert path.read_text() == text
    assert os.listdir(tmp_path) == ["bundle_manifest.yaml"]


def test_pin_of_the_last_line_needs_no_line_end(tmp_path: Path, api: HfApi) -> None:
    path = tmp_path / "bundle_manifest.yaml"
    text = MANIFEST.partition("\n  - name: two")[0].rstrip()
    path.write_text(text)
    pin(path, api=api)
    assert path.read_text().endswith(f'      model:   org/model\n      revision: "{MODEL_COMMIT}"')
    assert len(Manifest.load(path).entries) == 1
