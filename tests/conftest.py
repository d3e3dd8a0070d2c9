"""Fixtures that several parts share."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specforge_core import gpus, process
from specforge_core.benchmark import client
from specforge_core.stages import ResolvedTarget
from tests import tiny

pytest_plugins = ["tests.hub_like.fixtures"]


@pytest.fixture(scope="session")
def tiny_target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_target(tmp_path_factory.mktemp("tiny-target"))


@pytest.fixture(scope="session")
def tiny_target(tiny_target_dir: Path) -> ResolvedTarget:
    return tiny.resolved(tiny_target_dir)


@pytest.fixture(scope="session")
def tracker_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tracker with nothing in it, to be copied: making one takes a second."""
    # So does importing MLflow, which most tests do without.
    from tasks import tracking

    database = tmp_path_factory.mktemp("tracked") / "mlflow.db"
    tracking.mlflow_client(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tensors this small only pay for threads, and a busy machine makes them wait for each other.
    torch.set_num_threads(1)
    # The same for the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_counts() -> None:
    # A shell has what it starts in the background ignore it, and so would everything that is started from here.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _environment_as_it_was() -> Iterator[None]:
    # A command sets what its environment lacks, for the rest of its process.
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def _nothing_is_ending() -> None:
    # An interrupted flow leaves it set until the next flow begins, which is the end of its process in real life.
    process.ending.clear()


@pytest.fixture(scope="session", autouse=True)
def _short_waits() -> None:
    # Children and devices are there at once in tests, and servers again.
    process.POLL_S = gpus.POLL_S = client.BACKOFF_S = 0.02


def pytest_collection_finish() -> None:
    # What thousands of imported modules hold is there to the end: a collection need not look through it each time.
    gc.freeze()
