"""The tracker's database on disk: there whole or not at all, and one that cannot be opened says what to do."""

import logging
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks import tracking
from tasks.tracking import start_run, tracking_uri

KILLED_LAYING_OUT = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import Engine, event
from tasks.tracking import mlflow_client, tracking_uri

num_tables = 0

@event.listens_for(Engine, "after_cursor_execute")
def kill(connection, cursor, statement, *others):
    global num_tables
    num_tables += "CREATE TABLE" in statement
    if num_tables == 40:
        os.kill(os.getpid(), signal.SIGKILL)

mlflow_client(tracking_uri(Path(sys.argv[1])))
"""

STARTED_AT_ONCE = """
import sys
from pathlib import Path
from tasks.tracking import ENTRIES, start_run

sys.stdin.readline()
run = start_run(ENTRIES, sys.argv[2], store=Path(sys.argv[1]), tags={})
run.log_metrics({"a": 1.0})
assert run.is_tracked
"""


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "_failed_uris", set())


def test_a_kill_while_the_database_is_laid_out_costs_nothing(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_LAYING_OUT, str(tmp_path)], timeout=60, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "mlflow.db").exists()
    # Of an older one that was moved away; SQLite puts the pages of a journal into whatever bears its name.
    (tmp_path / "mlflow.db-journal").write_bytes(b"pages")
    # The lock stays, as others may wait for it.
    assert start_run(tracking.ENTRIES, "demo", store=tmp_path, tags={}).is_tracked
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


@pytest.mark.slow
def test_builds_that_start_at_once_on_a_fresh_store_are_all_tracked(tmp_path: Path) -> None:
    names = {"one", "two", "three"}
    builds = [
        subprocess.Popen([sys.executable, "-c", STARTED_AT_ONCE, str(tmp_path), name], stdin=subprocess.PIPE)
        for name in names
    ]
    for build in builds:
        build.communicate(b"go\n", timeout=120)
    assert [build.returncode for build in builds] == [0, 0, 0]
    client = MlflowClient(tracking_uri(tmp_path))
    experiment = client.get_experiment_by_name(tracking.ENTRIES)
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == names


@pytest.mark.parametrize("damage", ["laid out in part", "half a file", "no database"])
def test_a_database_that_cannot_be_opened_stops_a_build_before_its_first_stage(
    tracked_store: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = tracked_store / "mlflow.db"
    if damage == "laid out in part":
        with sqlite3.connect(database) as connection:
            connection.executescript("DELETE FROM alembic_version; DROP TABLE registered_models")
    elif damage == "half a file":
        os.truncate(database, database.stat().st_size // 2)
    else:
        database.write_bytes(b"no database" * 1000)
    with (
        caplog.at_level(logging.WARNING, logger="tasks.tracking"),
        pytest.raises(ValueError, match=r"MLflow cannot open .*\); move it away and build again") as error,
    ):
        start_run(tracking.ENTRIES, "demo", store=tracked_store, tags={})
    message = str(error.value)
    assert str(database) in message
    assert "\n" not in message
    assert "SELECT" not in message
    assert caplog.text == ""
