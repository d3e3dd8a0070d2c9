"""`specbundle build --publish-to hub`, as a user runs it, against the local Hub."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from specforge_core.digests import folder_sha256
from specforge_core.hub.publication import PublishPlan
from tests.factory import make_factory, tiny_entry
from tests.hub_like import server
from tests.hub_like.api import Account

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECRET = "hf_" + "nobody_may_ever_read_this"


class CommandLines(threading.Thread):
    """Collects what the process list shows of a process and all its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.seen = psutil.Process(pid), set[str]()

    def run(self) -> None:
        while self.root.is_running() and self.root.status() != psutil.STATUS_ZOMBIE:
            try:
                family = [self.root, *self.root.children(recursive=True)]
                self.seen |= {" ".join(process.cmdline()) for process in family}
            except psutil.NoSuchProcess:
                continue
            time.sleep(0.05)


def run_build(folder: Path, url: str, *options: str) -> tuple[str, set[str]]:
    """What a build printed, and every command line that it had meanwhile."""
    environ = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": SECRET,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        # Holds the leases: a build elsewhere on this host is not waited for.
        "TMPDIR": str(folder),
    }
    command = [sys.executable, "-m", "specforge_core.cli", "build", "--only", "tiny", *options]
    with subprocess.Popen(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = CommandLines(process.pid)
        lines.start()
        printed, _ = process.communicate(timeout=280)
    lines.join()
    assert process.returncode == 0, printed
    return printed, lines.seen


def loaded(folder: Path, url: str, dataset: str) -> int:
    """How many rows `datasets` finds, as the data set's card says to load it."""
    program = f"from datasets import load_dataset; print(len(load_dataset({dataset!r}, split='train')))"
    environ = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(folder / "hf")}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_build_publishes_once_and_nothing_that_is_left_holds_the_token(
    tmp_path: Path, hub_server: server.Hub
) -> None:
    hub_server.accounts = {SECRET: Account()}
    repositories = {"repository": "specbundle/tiny", "dataset": "specbundle/tiny-conversations", "collection": "Tiny"}
    make_factory(tmp_path, tiny_entry() | {"publish": repositories})

    planned, _ = run_build(tmp_path, hub_server.url, "--publish-to", "hub", "--dry-run")
    assert hub_server.storage.repositories == {}
    plan_file = tmp_path / ".specbundle/dry_run/tiny.publish_plan.json"
    assert str(plan_file) in planned
    plan = PublishPlan.model_validate_json(plan_file.read_text())

    printed, command_lines = run_build(tmp_path, hub_server.url, "--publish-to", "hub")
    assert f"{hub_server.url}/specbundle/tiny" in printed
    model = hub_server.storage.repositories["model", "specbundle/tiny"]
    head = {name: file.sha256 for name, file in model.head.files.items() if name != ".gitattributes"}
    assert head == plan.files == folder_sha256(tmp_path / ".specbundle/published/tiny")
    dataset = hub_server.storage.repositories["dataset", "specbundle/tiny-conversations"]
    assert loaded(tmp_path, hub_server.url, "specbundle/tiny-conversations") == 24

    again, _ = run_build(tmp_path, hub_server.url, "--publish-to", "hub")
    assert "(unchanged)" in again
    assert [len(repository.commits) for repository in (model, dataset)] == [2, 2]

    assert any("specforge_core" in line for line in command_lines)
    for text in (planned, printed, again, *command_lines):
        assert SECRET not in text
    # Artifacts, reports, plans, logs, the databases of Prefect and MLflow, the repositories.
    files = [file for root in (tmp_path, hub_server.storage.root) for file in root.rglob("*") if file.is_file()]
    assert any(file.suffix == ".db" for file in files)
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


def test_who_may_not_write_hears_it_before_any_stage(tmp_path: Path, hub_server: server.Hub) -> None:
    hub_server.accounts = {SECRET: Account(role="read")}
    make_factory(tmp_path, tiny_entry() | {"publish": {"to": "hub", "repository": "specbundle/tiny"}})
    with pytest.raises(AssertionError, match=r"the token of tester may only read") as caught:
        run_build(tmp_path, hub_server.url)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / ".specbundle/regenerate").exists()
