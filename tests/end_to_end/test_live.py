"""The chain up to a trained draft with features that are made while it trains, each stage in its own process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from specforge_core.artifacts import Artifact
from specforge_core.data.loader import FeatureSet
from specforge_core.manifest import ManifestEntry
from specforge_core.plan import STEPS, make_recipe
from tasks import stage as stage_module
from tasks.stage import EntryBuild, run_stage
from tasks.tracking import TrackedRun
from tests.factory import make_factory, tiny_entry

pytestmark = pytest.mark.slow


def trained(directory: Path, features: Mapping[str, Any]) -> dict[str, Artifact[Any]]:
    """The artifacts by stage."""
    entry = ManifestEntry.model_validate({**tiny_entry(), "features": features})
    recipe = make_recipe(entry, base_dir=directory, store=directory / "store", gpus=(), environ={})
    build = EntryBuild(
        recipe=recipe, store=directory / "store", gpus=(), publish_to="none", tracking=TrackedRun(uri="none")
    )
    made: dict[str, Artifact[Any]] = {}
    for name in ("regenerate", "vocabulary", "capture", "train"):
        step = STEPS[name]
        made[name] = run_stage(step.make_spec(recipe, *(made[read] for read in step.reads)), build).artifact
    return made


def test_a_live_build_stores_what_is_held_out_and_trains_the_draft_of_a_stored_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "device_lock_dir", lambda: tmp_path / "devices")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_factory(tmp_path)
    stored = trained(tmp_path, {"dtype": "float32"})
    live = trained(tmp_path, {"dtype": "float32", "mode": "live", "buffer_gib": 0.001})
    assert live["regenerate"].key == stored["regenerate"].key
    assert live["train"].key != stored["train"].key
    everything, held_out = (FeatureSet(made["capture"].path) for made in (stored, live))
    fraction = tiny_entry()["training"]["eval_fraction"]
    assert held_out.document_ids == [everything.document_ids[i] for i in everything.split(fraction).eval]
    theirs, ours = stored["train"].facts.model_dump(), live["train"].facts.model_dump()
    # Padded beside other documents, the target rounds its float32 sums in another way.
    for name, value in theirs.items():
        assert ours[name] == (value if isinstance(value, str | int) else pytest.approx(value, rel=1e-3)), name
    # What travels, and what a killed run would go on from, is gone.
    assert not (live["train"].path / "progress").exists()
