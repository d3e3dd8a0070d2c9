"""A local Hub, and a client of it, for every test that asks for them."""

from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from specforge_core.hub import client
from tests.hub_like import server
from tests.hub_like.server import TOKEN


@pytest.fixture
def hub_server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[server.Hub]:
    # The environment variable is read when the client is imported, which other tests have done.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with server.running(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(hub_server: server.Hub) -> client.Hub:
    """As the owner of a token that may write."""
    return client.Hub(hub_server.url, TOKEN, delays_s=(0.01,) * 3)
