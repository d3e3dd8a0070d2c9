"""A store with the tracker's database in it."""

from pathlib import Path

import pytest


@pytest.fixture
def tracked_store(tracker_database: Path, tmp_path: Path) -> Path:
    """A store whose tracker has nothing in it."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "mlflow.db").write_bytes(tracker_database.read_bytes())
    return store
