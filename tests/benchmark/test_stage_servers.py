"""A stage gets servers of its own, or those that its spec names."""

import json
from pathlib import Path

import pytest

from specforge_core.artifacts import SERVERS_DIRECTORY
from specforge_core.benchmark import server as server_module
from specforge_core.benchmark.server import is_healthy, server_info
from specforge_core.benchmark.stage_servers import stage_servers
from specforge_core.stages import ServedEngine
from tests.sglang_like import MODULE, Behaviour, read_journal

OPTIONS = {"--model-path": "scripted"}


@pytest.fixture(autouse=True)
def _servers_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SGLANG_MODULE", MODULE)


def test_servers_of_the_stage_get_its_options_and_variables_and_end_with_it(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    environment = dict([Behaviour(journal=str(journal)).variable()])
    with stage_servers(
        ServedEngine(),
        {**OPTIONS, "--max-running-requests": 3},
        name="draft",
        directory=tmp_path,
        environment=environment,
    ) as (server,):
        assert server_info(server.url)["max_running_requests"] == 3
        url = server.url
    assert not is_healthy(url, timeout_s=1.0)
    assert [line["event"] for line in read_journal(journal)] == ["start"]
    record = json.loads((tmp_path / SERVERS_DIRECTORY / "draft-0.json").read_text())
    assert record["version"] == "0.5.14"


def test_servers_that_run_already_go_on_after_the_stage(tmp_path: Path) -> None:
    with stage_servers(ServedEngine(), OPTIONS, name="baseline", directory=tmp_path) as (server,):
        engine = ServedEngine(urls=(server.url,))
        with stage_servers(engine, OPTIONS, name="attached", directory=tmp_path) as (attached,):
            assert attached.url == server.url
        assert is_healthy(server.url, timeout_s=1.0)
        other = {**OPTIONS, "--revision": "abc"}
        words = "was started with --revision None, this stage needs abc"
        with pytest.raises(ValueError, match=words), stage_servers(engine, other, name="other", directory=tmp_path):
            pass


def test_servers_that_run_already_are_refused_where_they_lack_what_a_stage_needs(tmp_path: Path) -> None:
    engine = ServedEngine(urls=("http://127.0.0.1:1",))
    with (
        pytest.raises(ValueError, match=r"engine\.urls=\['http://127\.0\.0\.1:1'\].*leave the URLs out"),
        stage_servers(engine, OPTIONS, name="capture", directory=tmp_path, allow_urls=False),
    ):
        pass
