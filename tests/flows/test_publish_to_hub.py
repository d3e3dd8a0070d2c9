"""Publishing to the Hub as a part of a build: where its token may lie, and when a build hears that it may not write."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from prefect import flow, task
from prefect.blocks.system import Secret

from flows import draft
from flows.specbundle import specbundle
from flows.summary import BuildSummary
from specforge_core.artifacts import BuildArtifacts
from specforge_core.facts import Published, Withheld
from specforge_core.ledger import load_entry_record
from tasks.publish import TOKEN_BLOCK, open_hub
from tests import made_build
from tests.factory import make_factory, tiny_entry
from tests.flows.test_specbundle import StagesByEntry
from tests.hub_like import server
from tests.hub_like.api import Account

pytestmark = pytest.mark.usefixtures("prefect_engine", "_no_token_here")


@pytest.fixture
def _no_token_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))


def test_a_worker_without_a_token_takes_the_one_of_the_block() -> None:
    @task
    def token() -> str | None:
        with pytest.raises(ValueError, match="needs a token"):
            open_hub()
        Secret(value="hf_of_the_block").save(TOKEN_BLOCK)
        found = open_hub().api.token
        Secret.delete(TOKEN_BLOCK)
        # What a task returns may be stored.
        return "as it should be" if found == "hf_of_the_block" else found

    @flow
    def publishing() -> str | None:
        return token()

    assert publishing() == "as it should be"


def test_an_entry_that_may_not_be_written_fails_before_its_first_stage_and_stops_no_other(
    tmp_path: Path, hub_server: server.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    hub_server.accounts = {server.TOKEN: Account(role="read")}
    artifacts: BuildArtifacts = made_build.artifacts(tmp_path / "made")
    stages = StagesByEntry(artifacts, tiny={}, here={})
    monkeypatch.setattr(draft, "stages", stages)
    on_hub = tiny_entry() | {"publish": {"to": "hub", "repository": "specbundle/tiny"}}
    manifest = make_factory(tmp_path, on_hub, tiny_entry("here"))
    state = specbundle(manifest=manifest, store=tmp_path / "store", return_state=True)
    summary = state.result(raise_on_failure=False)
    assert isinstance(summary, BuildSummary)
    rows = {row.entry: row for row in summary.rows}
    assert rows["tiny"].status == "failed"
    assert "the token of tester may only read, and model specbundle/tiny is to be written" in rows["tiny"].detail
    assert stages.fakes["tiny"].calls == []
    assert rows["here"].status == "published"
    # The same entry, for once into its folder.
    state = specbundle(
        manifest=manifest, store=tmp_path / "store", only=["tiny"], publish_to="directory", return_state=True
    )
    (row,) = state.result(raise_on_failure=False).rows
    assert row.status == "published"
    # After a dry run it still is.
    stages.fakes["tiny"].answers["publish"] = Withheld(plan=tmp_path / "plan.json")
    asked = {"only": ["tiny"], "publish_to": "directory", "dry_run": True}
    state = specbundle(manifest=manifest, store=tmp_path / "store", return_state=True, **asked)
    (row,) = state.result(raise_on_failure=False).rows
    assert (row.status, row.detail) == ("passed", f"not published, as asked; {tmp_path / 'plan.json'}")
    assert isinstance(load_entry_record(tmp_path / "store", "tiny").outcome, Published)
