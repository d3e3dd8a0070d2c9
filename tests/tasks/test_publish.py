"""The publish task, as a function: it fills the entry's folder and says whether anything changed."""

from pathlib import Path

import pytest

from specforge_core.artifacts import BuildArtifacts
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_publish import PublishConfig
from specforge_core.plan import Recipe
from specforge_core.stages import ResolvedBenchmark, ResolvedData, ResolvedSource, ResolvedSuite, ServedEngine
from tasks.publish import publish
from tasks.stage import EntryBuild
from tasks.tracking import TrackedRun
from tests import made_build


def build_of(entry: ManifestEntry, store: Path) -> EntryBuild:
    (train,) = entry.data.sources
    sources = (ResolvedSource(**train.model_dump(), content_id="c0ffee"),)
    suites = tuple(
        ResolvedSuite(name=suite.name, source=ResolvedSource(**suite.source.model_dump(), content_id="c0ffee"))
        for suite in entry.benchmark.suites
    )
    recipe = Recipe(
        entry=entry,
        engine=ServedEngine(**dict(entry.engine)),
        target=made_build.TARGET,
        data=ResolvedData(sources=sources),
        benchmark=ResolvedBenchmark(suites=suites),
        hardware="Made-up CPU 9000",
    )
    return EntryBuild(recipe=recipe, store=store, gpus=(), publish_to="directory", tracking=TrackedRun(uri="sqlite://"))


@pytest.fixture
def artifacts(tmp_path: Path) -> BuildArtifacts:
    return made_build.artifacts(tmp_path / "store")


def test_a_draft_lies_in_the_store_under_its_entrys_name(tmp_path: Path, artifacts: BuildArtifacts) -> None:
    published = publish.fn(build_of(made_build.entry(), tmp_path / "store"), artifacts)
    assert published.changed
    assert published.path == tmp_path / "store/published/demo"
    weights = (artifacts.draft.path / "model.safetensors").read_bytes()
    assert (published.path / "model.safetensors").read_bytes() == weights
    assert "| math | 3-1-4 | 1 | 10 | 3.00 |" in (published.path / "README.md").read_text()


def test_publishing_the_same_build_again_changes_nothing(tmp_path: Path, artifacts: BuildArtifacts) -> None:
    build = build_of(made_build.entry(), tmp_path / "store")
    first, again = publish.fn(build, artifacts), publish.fn(build, artifacts)
    assert (again.changed, again.content_id) == (False, first.content_id)


def test_the_manifest_may_name_another_folder(tmp_path: Path, artifacts: BuildArtifacts) -> None:
    elsewhere = made_build.entry(publish=PublishConfig(directory=str(tmp_path / "elsewhere")))
    published = publish.fn(build_of(elsewhere, tmp_path / "store"), artifacts)
    assert published.path == tmp_path / "elsewhere/demo"
