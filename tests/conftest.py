"""Fixtures that several parts share."""

import os
from pathlib import Path

import pytest

# Before torch reads it, and for the processes that tests start: tensors this small only pay for threads, and on a busy
# machine these wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from specforge_core.process import ending
from specforge_core.stages import ResolvedTarget
from tests import tiny


@pytest.fixture(scope="session")
def tiny_target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_target(tmp_path_factory.mktemp("tiny-target"))


@pytest.fixture(scope="session")
def tiny_target(tiny_target_dir: Path) -> ResolvedTarget:
    return tiny.resolved(tiny_target_dir)


@pytest.fixture(autouse=True)
def _nothing_is_ending() -> None:
    # An interrupted flow leaves it set until the next flow begins, which is the end of its process in real life.
    ending.clear()
