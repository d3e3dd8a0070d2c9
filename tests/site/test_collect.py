"""What the site shows is what the store's records say."""

from pathlib import Path

import pytest

from specforge_core.benchmark.history import record_report
from specforge_core.facts import Withheld
from specforge_core.ledger import record_outcome, record_stage
from specforge_core.site.collect import Champion, Curve, EntryView, collect
from tests.site import made_store
from tests.site.conftest import MadeSite


def view_of(made: MadeSite, name: str) -> EntryView:
    views = collect(made.store, made.entries, {"demo": Champion("v3", "draft-2")})
    return next(view for view in views if view.name == name)


def test_entries_stand_in_the_manifests_order_with_what_became_of_them(made: MadeSite) -> None:
    views = collect(made.store, made.entries, {})
    assert {view.name: view.status for view in views} == {
        "demo": "published",
        "llama": "published",
        "worse": "rejected",
        "big": "never built",
    }
    assert [view.name for view in views] == ["demo", "llama", "worse", "big"]


def test_an_entry_that_left_the_manifest_is_still_shown(made: MadeSite) -> None:
    views = collect(made.store, made.entries[1:2], {})
    assert [view.name for view in views] == ["llama", "demo", "worse"]


def test_the_figures_are_those_of_the_newest_build(made: MadeSite) -> None:
    view = view_of(made, "demo")
    assert len(view.history.reports) == 3
    assert view.means is not None
    # Suites at 1.8 and 2.0: the root of 3.6; 300 tokens in 100 steps each.
    assert view.means.speedup == pytest.approx(3.6**0.5)
    assert view.means.acceptance_length == 3.0
    # 1.8 (1.6 to 2.0) and 2.0 (1.8 to 2.2): below, logarithms of 1.8 / 1.6 = 1.125 and 2.0 / 1.8 = 1.111 are 0.1178 and
    # 0.1054, their hypotenuse 0.1580, half of that 0.0790; above, 0.1054 and 0.0953, 0.1421, 0.0710.
    assert view.speedup_interval == pytest.approx((1.8974, 1.7532, 2.0371), abs=2e-4)
    # 9 of 10 identical and 1 at a near-tie, in each suite.
    assert view.num_identical == (20, 20)
    assert view.measured_at == made_store.FIRST_BUILD
    assert view.champion == ("v3", "draft-2", None, None)


def test_the_champions_figures_are_shown_whatever_was_built_since(made: MadeSite) -> None:
    # The first of demo's three builds, at 1.6 and 1.8.
    (view, *_) = collect(made.store, made.entries, {"demo": Champion("v1", "draft-0")})
    assert view.means is not None
    assert view.means.speedup == pytest.approx(2.88**0.5)
    assert view.report is view.history.reports[0].report
    assert view.last is view.history.reports[2].report

    # One that was rejected, of which users have an older version, which this store never saw.
    (_, _, worse, _) = collect(made.store, made.entries, {"worse": Champion("v9", "draft-of-another-store")})
    assert worse.report is worse.last
    assert (worse.status, worse.is_published) == ("rejected", True)


def test_a_speedup_is_summed_up_at_the_first_serving_configuration_alone(made: MadeSite) -> None:
    view = view_of(made, "llama")
    # 2.0 and 2.4 at 3-1-4; the figures at 7-1-8 do not count.
    assert view.speedup_interval is not None
    assert view.speedup_interval.value == pytest.approx(4.8**0.5)


def test_curves_are_read_by_name_and_a_line_that_is_still_written_is_left_out(tmp_path: Path) -> None:
    entries = made_store.make_store(tmp_path)
    (tmp_path / "train" / "key-train" / "metrics.jsonl").write_text(
        '{"step": 2, "train/loss": 9.5}\n{"step": 4, "train/loss": 8.5, "eval/loss": 8, "note": "x"}\n{"step": 6, "tr'
    )
    view = next(view for view in collect(tmp_path, entries, {}) if view.name == "demo")
    assert view.curves == (Curve("train/loss", (2, 4), (9.5, 8.5)), Curve("eval/loss", (4,), (8.0,)))


def test_the_status_follows_the_last_outcome(tmp_path: Path) -> None:
    demo, llama, *_ = made_store.entries()

    def status() -> str:
        return collect(tmp_path, [demo], {})[0].status

    record_stage(tmp_path, "demo", stage="regenerate", key="first")
    assert status() == "started"
    record_report(tmp_path, made_store.report(tmp_path / "made", demo, made_store.suites(1.5)))
    assert status() == "building"
    record_outcome(tmp_path, "demo", Withheld())
    assert status() == "passed"
    # A report from another host, without its records.
    record_report(tmp_path, made_store.report(tmp_path / "other", llama, made_store.suites(1.5)))
    assert collect(tmp_path, [llama], {})[0].status == "passed"
