"""Builds one after the other: which draft users get. The stages are fakes, gates, registry and publishing are real."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows import draft, stages
from flows.specbundle import specbundle
from flows.summary import EntryRow
from specforge_core.artifacts import BuildArtifacts, load_artifact, seal
from specforge_core.benchmark.report import load_report
from specforge_core.facts import ServingDraft
from specforge_core.manifest import Manifest
from tasks.registry import registered
from tasks.rollback import roll_back
from tests import made_build
from tests.factory import make_factory, tiny_entry
from tests.made_build import measurement, prompts

pytestmark = pytest.mark.usefixtures("prefect_engine")

GATES = {"min_speedup": 0.0, "max_regression": 0.05, "min_improvement": 0.0}


class Bundle:
    """A bundle of one entry; every build makes the draft that it is told to."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, root / "store"
        self.manifest = make_factory(root, tiny_entry("demo") | {"gates": GATES})
        self.known: dict[int, BuildArtifacts] = {}
        self.made: BuildArtifacts

    def __getattr__(self, stage: str) -> Any:
        """In the place of the module `flows.stages`."""
        fields = {"regenerate": "conversations", "capture": "hidden_states", "train": "checkpoint", "export": "draft"}
        if stage in (*fields, "vocabulary", "benchmark"):
            return lambda build, *inputs: getattr(self.made, fields.get(stage, stage))
        return getattr(stages, stage)

    def build(self, number: int, *steps: int) -> EntryRow:
        """Of a draft whose weights are this number, which gives 30 tokens of each of its prompts in these steps."""
        if number not in self.known:
            self.known[number] = self.make(number, *steps)
        self.made = self.known[number]
        (row,) = specbundle(manifest=self.manifest, store=self.store, return_state=True).result(False).rows
        return row

    def make(self, number: int, *steps: int) -> BuildArtifacts:
        figures = measurement(num_output_tokens=30 * len(steps), num_verify_steps=sum(steps), prompts=prompts(*steps))
        made = made_build.artifacts(self.root / f"made-{number}", made_build.result(figures))
        (made.draft.path / "model.safetensors").write_bytes(bytes([number]) * 100)
        key, place = f"key-{number}", self.store / "export" / f"key-{number}"
        seal(made.draft.path, made.draft.facts, stage="export", key=key, inputs={}, elapsed_s=1.0, hardware=None)
        place.parent.mkdir(parents=True, exist_ok=True)
        made.draft.path.rename(place)
        return made._replace(draft=load_artifact(place, ServingDraft))

    @property
    def users_get(self) -> tuple[int, int]:
        """The number of the draft in the folder, and the champion's version."""
        (number,) = set((self.store / "published/demo/model.safetensors").read_bytes())
        champion = registered("demo", store=self.store).champion
        assert champion is not None
        return number, champion.number

    def statuses(self) -> list[str]:
        return [version.status for version in registered("demo", store=self.store).versions]


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    bundle = Bundle(tmp_path)
    monkeypatch.setattr(draft, "stages", bundle)
    return bundle


def test_a_worse_draft_is_rejected_and_kept_and_users_keep_the_champion(bundle: Bundle) -> None:
    assert bundle.build(1, 10, 10, 10).status == "published"
    row = bundle.build(2, 11, 11, 11)
    assert row.status == "rejected"
    assert (
        "acceptance length 2.73 on math with 3-1-4 at concurrency 1, the champion (version 1) has 3.00: "
        "-9.1% (-9.1% to -9.1%), -5.0% is allowed" in row.detail
    )
    assert row.detail.endswith("or raise max_regression (and 1 more, in its report)")
    assert (bundle.users_get, bundle.statuses()) == ((1, 1), ["published", "rejected"])
    assert (bundle.store / "export/key-2/model.safetensors").is_file()
    report = load_report(bundle.store / "reports/demo.json")
    assert [failure.gate for failure in report.failures] == ["max_regression", "min_improvement"]
    text = (bundle.store / "reports/demo.md").read_text()
    assert "## Against the champion, version 1" in text
    assert "| math | 3-1-4 | 1 | acceptance length | 3.00 | 2.73 | -9.1% (-9.1% to -9.1%) |" in text
    # A better one takes its place, and the same one again changes nothing.
    assert bundle.build(3, 9, 10, 10).status == "published"
    assert (bundle.users_get, bundle.statuses()) == ((3, 3), ["published", "rejected", "published"])
    again = bundle.build(3, 9, 10, 10)
    assert again.detail.endswith("(unchanged)")
    assert bundle.users_get == (3, 3)


@pytest.mark.slow
def test_a_draft_that_cannot_be_published_stays_a_candidate(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.build(1, 10, 10, 10)

    def fail(*args: Any) -> None:
        raise ConnectionError("nobody can write there")

    with monkeypatch.context() as broken:
        broken.setattr(stages, "publish", fail)
        assert bundle.build(2, 9, 9, 9).status == "failed"
    assert (bundle.users_get, bundle.statuses()) == ((1, 1), ["published", "candidate"])
    aliases = MlflowClient(f"sqlite:///{bundle.store / 'mlflow.db'}").get_registered_model("specbundle.demo").aliases
    assert aliases == {"champion": 1, "candidate": 2}
    # The next build goes on from there.
    assert bundle.build(2, 9, 9, 9).status == "published"
    assert bundle.users_get == (2, 2)


@pytest.mark.slow
def test_a_build_of_what_was_rolled_back_is_rejected_and_another_draft_is_not(bundle: Bundle) -> None:
    bundle.build(1, 10, 10, 10)
    bundle.build(2, 9, 9, 9)
    (entry,) = Manifest.load(bundle.manifest).entries
    roll_back(entry, None, base_dir=bundle.root, store=bundle.store)
    assert bundle.users_get == (1, 1)
    row = bundle.build(2, 9, 9, 9)
    assert row.status == "rejected"
    assert "this draft is version 2, from which the entry was rolled back" in row.detail
    assert bundle.users_get == (1, 1)
    assert bundle.build(3, 9, 9, 9).status == "published"
    assert bundle.users_get == (3, 3)


@pytest.mark.slow
def test_without_its_registry_an_entry_with_relative_gates_is_rejected_and_nothing_is_lost(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle.build(1, 10, 10, 10)
    with monkeypatch.context() as gone:
        gone.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        gone.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        row = bundle.build(2, 9, 9, 9)
    assert row.status == "rejected"
    assert "the champion is unknown: the registry at http://127.0.0.1:9 cannot be asked" in row.detail
    assert bundle.users_get == (1, 1)
    assert bundle.build(2, 9, 9, 9).status == "published"
    assert bundle.users_get == (2, 2)
