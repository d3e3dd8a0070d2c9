"""A tiny target whose answers end by themselves now and then."""

import pytest

from specforge_core.stages import ResolvedTarget
from tests import tiny


@pytest.fixture(scope="session")
def talkative_target(tmp_path_factory: pytest.TempPathFactory) -> ResolvedTarget:
    return tiny.resolved(tiny.make_talkative_target(tmp_path_factory.mktemp("talkative")))
