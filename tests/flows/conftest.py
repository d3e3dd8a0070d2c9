"""Prefect's engine for the tests that need it: a server of their own, started once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness


@pytest.fixture(scope="session")
def prefect_engine() -> Iterator[None]:
    # Without a heartbeat a flow run ends at once; its thread would sleep for a second first.
    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield


@pytest.fixture(autouse=True)
def _tracker(request: pytest.FixtureRequest) -> None:
    # Builds in the engine are tracked in their store.
    if "prefect_engine" in request.fixturenames:
        store = request.getfixturevalue("tmp_path") / "store"
        store.mkdir()
        database: Path = request.getfixturevalue("tracker_database")
        (store / "mlflow.db").write_bytes(database.read_bytes())
