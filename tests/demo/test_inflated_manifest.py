"""The manifest of the enlarged target fits what `inflate` makes, from any folder."""

import json
import sys
from pathlib import Path

import pytest

from specforge_core.demo import inflate
from specforge_core.manifest import Manifest
from specforge_core.resolve import resolve_benchmark, resolve_data, resolve_target
from tests.demo.test_inflate import SHAPE

MANIFEST = Path(inflate.__file__).with_name("inflated_manifest.yaml")


def test_the_manifest_finds_the_target_where_inflate_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = Manifest.load(MANIFEST).entries
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"demo-llama-3\.1-8b is no model folder"):
        resolve_target(entry.target, MANIFEST.parent)
    # The same name with a size for tests.
    monkeypatch.setitem(inflate.SHAPES, "llama-3.1-8b", SHAPE)
    monkeypatch.setattr(sys, "argv", ["inflate", "--shape", "llama-3.1-8b"])
    inflate.main()
    assert Path(resolve_target(entry.target, MANIFEST.parent).model).is_relative_to(tmp_path)


def test_every_source_of_the_manifest_exists_and_enough_is_held_out() -> None:
    (entry,) = Manifest.load(MANIFEST).entries
    resolve_data(entry.data, MANIFEST.parent)
    benchmark = resolve_benchmark(entry.benchmark, MANIFEST.parent)
    assert all(suite.source.split == "heldout" for suite in benchmark.suites)
    assert sum(suite.source.limit or 0 for suite in benchmark.suites) >= 64
    assert benchmark.sweep is not None


def test_the_entry_stays_within_the_small_target() -> None:
    (entry,) = Manifest.load(MANIFEST).entries
    small = json.loads((inflate.DEMO_TARGET / "config.json").read_text(encoding="utf-8"))
    assert entry.data.max_prompt_tokens + entry.data.max_new_tokens <= small["max_position_embeddings"]
    # See the docstring of `inflate`: a row of an added token is no start for a draft's head.
    assert entry.draft.draft_vocab_size <= small["vocab_size"]
