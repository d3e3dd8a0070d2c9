"""The site at the end of a build: with what the registry and the tracker know, and never a reason to lose the build."""

import logging
from pathlib import Path

import pytest

from specforge_core.benchmark.history import record_report
from tasks import site, tracking
from tests.site import made_store
from tests.tasks.test_registry import Factory


def test_a_site_shows_the_champion_of_the_registry_and_links_to_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    factory, entries = Factory(tmp_path), made_store.entries()
    build = factory.build()
    record_report(tmp_path, factory.report(build, "first"))
    untracked = site.write_site(tmp_path / "elsewhere", entries).read_text()
    assert ">MLflow<" not in untracked

    factory.publish("first")
    index = site.write_site(tmp_path, entries)
    assert '<span class="champion">v1</span>' in index.read_text()
    assert '<span class="champion">champion</span>' in (index.parent / "entries" / "demo.html").read_text()
    url = tracking.comparison_url(tmp_path)
    assert url
    assert url in index.read_text().replace("&amp;", "&").replace("&#39;", "'")

    factory.publish("second")
    page = (site.write_site(tmp_path, entries).parent / "entries" / "demo.html").read_text()
    assert '<span class="champion">v2</span>' in page
    # The build that is shown made another draft.
    assert '<span class="champion">champion</span>' not in page


def test_a_site_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "site").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert site.update_site(tmp_path, made_store.entries()) is None
    assert "the site is not written, and the build goes on: NotADirectoryError" in caplog.text
