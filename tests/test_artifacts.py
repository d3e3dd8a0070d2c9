"""The artifact store: what survives a kill, what counts as done, and who may build."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from specforge_core.artifacts import (
    RECORD_NAME,
    Artifact,
    Store,
    content_id_of,
    damaged_files,
    load_artifact,
    seal,
    write_atomically,
)
from specforge_core.digests import digest, files_sha256
from specforge_core.facts import BenchmarkResult, Environment, Lossless, Measurement, Vocabulary
from specforge_core.manifest_sections import ServingConfig

FACTS = Vocabulary(draft_vocab_size=2, target_vocab_size=4, coverage=0.5)
STAGE, KEY = "vocabulary", "k"
TIMEOUT_S = 30.0


def build(store: Store, content: str = "rows", *, key: str = KEY) -> Artifact[Vocabulary]:
    with store.building(STAGE, key) as (directory, _):
        (directory / "rows.txt").write_text(content)
        seal(directory, FACTS, stage=STAGE, key=key, inputs={"conversations": "c"}, elapsed_s=1.23456)
        return store.commit(directory, STAGE, key, Vocabulary)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S} s"
        time.sleep(0.01)


def test_a_built_artifact_is_found_with_its_facts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find(STAGE, KEY, Vocabulary) is None
    built = build(store)
    found = store.find(STAGE, KEY, Vocabulary)
    assert found == built
    assert found is not None
    assert found.path == tmp_path / STAGE / KEY
    assert (found.facts, found.inputs, found.elapsed_s) == (FACTS, {"conversations": "c"}, 1.235)
    assert found.files["rows.txt"].sha256 == hashlib.sha256(b"rows").hexdigest()
    assert found.files["rows.txt"].size_bytes == 4


def test_a_file_whose_sha256_is_known_is_not_read_again(tmp_path: Path) -> None:
    for name in ("known", "other"):
        (tmp_path / name).write_text(name)
    artifact = seal(tmp_path, FACTS, stage=STAGE, key=KEY, inputs={}, elapsed_s=0.0, known_sha256={"known": "0" * 64})
    assert artifact.files["known"].sha256 == "0" * 64
    assert artifact.files["known"].size_bytes == 5
    assert artifact.files["other"].sha256 == hashlib.sha256(b"other").hexdigest()


def test_an_interrupted_build_keeps_its_progress_and_is_not_found(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def interrupted() -> None:
        with store.building(STAGE, KEY) as (directory, _):
            (directory / "rows.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.find(STAGE, KEY, Vocabulary) is None
    with store.building(STAGE, KEY) as (directory, _):
        assert (directory / "rows.txt").read_text() == "half"


def test_a_build_killed_between_its_seal_and_its_move_is_finished_by_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.building(STAGE, KEY) as (directory, _):
        seal(directory, FACTS, stage=STAGE, key=KEY, inputs={}, elapsed_s=0.0)
    assert store.find(STAGE, KEY, Vocabulary) is None
    with store.building(STAGE, KEY) as (directory, _):
        assert store.find(STAGE, KEY, Vocabulary) is not None
        assert os.listdir(directory) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.txt", None), ("rows.txt", "row"), (RECORD_NAME, "{"), (RECORD_NAME, '{"stage": "vocabulary"}')],
)
def test_a_damaged_artifact_is_reported_and_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: str | None
) -> None:
    store = Store(tmp_path)
    path = build(store).path / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert store.find(STAGE, KEY, Vocabulary) is None
    assert f"{STAGE}/{KEY}" in caplog.text
    assert name in caplog.text
    build(store)
    assert store.find(STAGE, KEY, Vocabulary) is not None


def test_a_record_of_another_type_counts_as_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    build(store)
    assert store.find(STAGE, KEY, BenchmarkResult) is None


def test_changed_bytes_of_the_same_size_are_seen_when_content_is_read(tmp_path: Path) -> None:
    artifact = build(Store(tmp_path))
    (artifact.path / "rows.txt").write_text("swor")
    assert damaged_files(artifact) == []
    assert damaged_files(artifact, read_content=True) == ["rows.txt"]


def test_the_content_id_follows_the_content_and_not_how_it_came_to_be(tmp_path: Path) -> None:
    def content_id(name: str, facts: Vocabulary = FACTS, **files: str) -> str:
        directory = tmp_path / name
        (directory / "sub").mkdir(parents=True)
        for file, text in {"rows.txt": "rows", **files}.items():
            (directory / file).write_text(text)
        seal(directory, facts, stage=STAGE, key=name, inputs={"of": name}, elapsed_s=len(name))
        return content_id_of(directory)

    first = content_id("a")
    by_hand = {"facts": {"draft_vocab_size": 2, "target_vocab_size": 4, "coverage": 0.5}}
    assert first == digest({**by_hand, "files": {"rows.txt": hashlib.sha256(b"rows").hexdigest()}})
    noise = {"stage.log": "12:00", "metrics.jsonl": "{}", "spec.json": "{}", ".rows.txt.17-3.partial": "ro"}
    assert content_id("longer", **noise) == first
    assert not (tmp_path / "longer/.rows.txt.17-3.partial").exists()
    assert content_id("c", **{"rows.txt": "other"}) != first
    assert content_id("d", FACTS.model_copy(update={"coverage": 0.6})) != first
    # Only the run's own log is no content: a file further down that has its name is.
    assert content_id("e", **{"sub/stage.log": "12:00"}) != first


def test_a_commit_under_another_key_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.building(STAGE, KEY) as (directory, _):
        seal(directory, FACTS, stage=STAGE, key="other", inputs={}, elapsed_s=0.0)
        with pytest.raises(AssertionError, match="sealed as other, not k"):
            store.commit(directory, STAGE, KEY, Vocabulary)


def test_a_benchmark_record_is_read_back_as_written(tmp_path: Path) -> None:
    measurement = Measurement(
        suite="s",
        serving=ServingConfig(),
        num_prompts=1,
        num_output_tokens=30,
        num_verify_steps=10,
        accepted_by_position=(9, 7, 4),
        ngram_acceptance_length=1.5,
        baseline_output_tokens_per_s=(10.0, 11.0),
        output_tokens_per_s=(20.0, 21.0),
        speedup=2.0,
        speedup_low=1.9,
        speedup_high=2.1,
        lossless=Lossless(num_identical=1, num_near_tie=0, num_different=0),
    )
    environment = Environment(cpu="c", num_threads=2, gpu=None, versions={}, commit=None, command="x")
    facts = BenchmarkResult(measurements=(measurement,), environment=environment)
    seal(tmp_path, facts, stage="benchmark", key="b", inputs={}, elapsed_s=0.0)
    loaded = load_artifact(tmp_path, BenchmarkResult).facts
    assert loaded == facts
    assert loaded.measurements[0].acceptance_length == 3.0
    # For readers of the file, too.
    assert '"acceptance_length":3.0' in facts.model_dump_json()


BUILDER = """
import sys, time
from pathlib import Path
from specforge_core.artifacts import Store, seal
from specforge_core.facts import Vocabulary
root, go = Path(sys.argv[1]), Path(sys.argv[2])
(go.parent / f"ready-{sys.argv[3]}").touch()
while not go.exists():
    time.sleep(0.001)
store = Store(root)
with store.building("vocabulary", "k") as (directory, lock_fd):
    if store.find("vocabulary", "k", Vocabulary):
        print("found")
    else:
        time.sleep(0.3)
        (directory / "rows.txt").write_text(sys.argv[3])
        facts = Vocabulary(draft_vocab_size=2, target_vocab_size=4, coverage=0.5)
        seal(directory, facts, stage="vocabulary", key="k", inputs={}, elapsed_s=0.0)
        store.commit(directory, "vocabulary", "k", Vocabulary)
        print("built")
"""


def test_of_two_processes_with_one_key_one_builds_and_the_other_finds(tmp_path: Path) -> None:
    go = tmp_path / "go"
    commands = [[sys.executable, "-c", BUILDER, str(tmp_path / "store"), str(go), str(i)] for i in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    go.touch()
    assert sorted(process.communicate(timeout=TIMEOUT_S)[0].strip() for process in processes) == ["built", "found"]


HOLDER = """
import subprocess, sys, time
from pathlib import Path
from specforge_core.artifacts import Store
with Store(Path(sys.argv[1])).building("vocabulary", "k") as (directory, lock_fd):
    (directory / "rows.txt").write_text("half")
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock_fd])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_builder_is_held_until_its_last_child_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child_pid = int(holder.stdout.readline())
    progress: list[str] = []

    def build_next() -> None:
        with Store(tmp_path).building(STAGE, KEY) as (directory, _):
            progress.append((directory / "rows.txt").read_text())

    holder.kill()
    holder.wait(TIMEOUT_S)
    holder.stdout.close()
    next_builder = threading.Thread(target=build_next)
    next_builder.start()
    try:
        next_builder.join(0.3)
        assert progress == [], "the child still writes"
    finally:
        os.kill(child_pid, signal.SIGKILL)
    next_builder.join(TIMEOUT_S)
    assert progress == ["half"]


def test_an_atomic_write_that_fails_leaves_the_old_content_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_digest_is_the_sha256_of_sorted_compact_json() -> None:
    assert digest({"b": [1, None], "a": "x"}) == hashlib.sha256(b'{"a":"x","b":[1,null]}').hexdigest()[:20]


def test_files_are_hashed_in_the_order_asked(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(20)]
    for path in paths:
        path.write_text(path.name)
    assert files_sha256(paths, desc="x") == [hashlib.sha256(path.name.encode()).hexdigest() for path in paths]
