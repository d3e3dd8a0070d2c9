"""One store and one site of it, for all tests that only read them."""

from pathlib import Path
from typing import NamedTuple

import pytest

from specforge_core.manifest import ManifestEntry
from specforge_core.site.collect import Champion
from specforge_core.site.render import write_site
from tests.site.made_store import make_store

COMPARISON = "http://127.0.0.1:5000/#/experiments/2/runs?compareRunsMode=CHART"


class MadeSite(NamedTuple):
    store: Path
    entries: tuple[ManifestEntry, ...]
    site: Path

    def text(self, page: str) -> str:
        return (self.site / page).read_text()


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeSite:
    store = tmp_path_factory.mktemp("store")
    entries = make_store(store)
    champion = Champion("v3", "draft-2", "specbundle/demo", "https://example.org/specbundle/demo")
    index = write_site(store, entries, champions={"demo": champion}, comparison_url=COMPARISON)
    return MadeSite(store, entries, index.parent)
