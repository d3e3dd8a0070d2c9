"""A store with the tracker's database in it."""

from pathlib import Path

import pytest

from tasks import tracking


@pytest.fixture(scope="session")
def _database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Made once: it takes a second.
    store = tmp_path_factory.mktemp("tracked")
    tracking.mlflow_client(f"sqlite:///{store / 'mlflow.db'}").search_experiments()
    return store / "mlflow.db"


@pytest.fixture
def tracked_store(_database: Path, tmp_path: Path) -> Path:
    """A store whose tracker has nothing in it."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "mlflow.db").write_bytes(_database.read_bytes())
    return store
