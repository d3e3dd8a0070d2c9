"""Fixtures that several parts share."""

from pathlib import Path

import pytest

from specforge_core.stages import ResolvedTarget
from tests import tiny


@pytest.fixture(scope="session")
def tiny_target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_target(tmp_path_factory.mktemp("tiny-target"))


@pytest.fixture(scope="session")
def tiny_target(tiny_target_dir: Path) -> ResolvedTarget:
    return tiny.resolved(tiny_target_dir)
