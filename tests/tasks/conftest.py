"""A store with the tracker's database in it, and builds that use it."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.tasks.made_drafts import Factory


@pytest.fixture
def tracked_store(tracker_database: Path, tmp_path: Path) -> Path:
    """A store whose tracker has nothing in it."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "mlflow.db").write_bytes(tracker_database.read_bytes())
    return store


@pytest.fixture
def factory(tracked_store: Path, monkeypatch: pytest.MonkeyPatch) -> "Factory":
    """Builds of made-up drafts, tracked in their store."""
    # Here, because tests without a tracker should not wait for MLflow.
    from tasks import tracking
    from tests.tasks.made_drafts import Factory

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "_failed_uris", set())
    return Factory(tracked_store)
