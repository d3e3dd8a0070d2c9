"""The pages say what was measured, and what a record says never becomes code. How they look is in test_browser."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from specforge_core.benchmark.compare import Change, Comparison
from specforge_core.benchmark.history import record_report
from specforge_core.demo.inflated import InflatedTarget
from specforge_core.facts import Answers, GateFailure, Published, Rejected
from specforge_core.ledger import EntryRecord, record_outcome
from specforge_core.manifest_sections import ServingConfig
from specforge_core.site.collect import Champion, collect
from specforge_core.site.render import gate_figures, repository_url, web_url, write_site
from tests.site import made_store
from tests.site.conftest import COMPARISON, MadeSite


class Page(HTMLParser):
    """What a page is made of: its elements with their attributes, and its text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._is_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._is_script = tag == "script"
        # As a reader sees it, cells stand apart and what is in a line does not.
        self.text += "" if tag in ("b", "small") else " "

    def handle_endtag(self, tag: str) -> None:
        self._is_script = False

    def handle_data(self, data: str) -> None:
        if not self._is_script:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def words(made: MadeSite, page: str) -> str:
    return re.sub(r"\s+", " ", Page(made.text(page)).text)


def test_the_site_is_whole_and_small(made: MadeSite) -> None:
    files = {path.relative_to(made.site).as_posix(): path.stat().st_size for path in made.site.rglob("*.*")}
    pages = {"index.html", "anchors.html", *(f"entries/{name}.html" for name in ("demo", "llama", "worse", "big"))}
    assets = {"assets/site.css", "assets/site.js", "assets/theme.js"}
    (library,) = files.keys() - pages - assets
    assert re.fullmatch(r"assets/vega-[\w.]+\.js", library)
    assert files[library] < 1_000_000
    assert sum(files.values()) - files[library] < 400_000


def test_the_overview_lists_every_entry_with_its_figures(made: MadeSite) -> None:
    text = words(made, "index.html")
    # The root of 3.6, and its interval as in test_collect.
    assert "demo made-up/Small-Target 3.00 1.90× 1.75 to 2.04 published v3 2026-11-01" in text
    assert "big made-up/Big-Target ≥ 2.50 ≥ 1.50× never built – – 1 GPU wanted" in text
    # Of the two published: the fourth root of 3.6 times 4.8.
    assert "2.04× the speed, the same text" in text
    assert "published 2 of 4" in text


def test_the_page_of_an_entry_shows_results_history_and_champion(made: MadeSite) -> None:
    text = words(made, "entries/demo.html")
    assert "gsm8k 3-1-4 3.00 1.80× 1.60 to 2.00 1 102 → 204 1.25 10 9 / 1 / 0" in text
    assert "2 3.00 1.20× rejected min_speedup 2026-11-02 08:30 Made-up CPU 9000, 4 threads 0123abc" in text
    assert "Users get v3 from specbundle/demo." in text
    assert "The last build passed its gates and is published." in text
    # The last build made the champion.
    assert "3 3.00 1.90× passed champion 2026-11-03 08:30" in text


def test_a_served_entry_says_what_to_start_at_which_load(made: MadeSite) -> None:
    text = words(made, "entries/llama.html")
    assert "Switch speculation off from 16 requests at once" in text
    assert "1 7-1-8 155 → 340 2.19× 8 2-1-3 1,130 → 1,470 1.30× 16 no draft 2,200 1.00×" in text
    assert "At 8 requests at once, chain 2-1-3 (1.30x)" in text
    assert "--speculative-num-steps 7" in text
    assert "2.55, 1.77× lmsys/SGLang-EAGLE3-Llama-3.1-8B-Instruct-SpecForge" in text
    assert "5.40, 3.34× lmsys/SGLang-EAGLE3-Llama-3.1-8B-Instruct-SpecForge" in text


def test_a_rejected_draft_says_which_gate_failed_and_how_to_serve_it_is_not_said(made: MadeSite) -> None:
    text = words(made, "entries/worse.html")
    assert "min_speedup gsm8k 1.10 1.50 1.1 is below 1.5 <script>document.title = 'taken over'</script>" in text
    assert "Serve it" not in text


@pytest.mark.parametrize(
    ("gate", "measured", "required", "expected"),
    [
        ("min_acceptance_length", 1.8, 2.5, ("1.80", "2.50")),
        # Not twice 0.95.
        ("min_vocabulary_coverage", 0.9496, 0.95, ("0.9496", "0.9500")),
        ("lossless", 3.0, 0.0, ("3", "0")),
        ("max_serving_gap", None, 0.05, ("–", "0.05")),
    ],
)
def test_what_a_gate_measured_differs_from_what_it_requires(
    gate: str, measured: float | None, required: float, expected: tuple[str, str]
) -> None:
    assert (
        gate_figures(GateFailure(gate=gate, suite=None, measured=measured, required=required, message="")) == expected
    )


def test_what_only_some_benchmarks_measure_has_a_column_there(tmp_path: Path, made: MadeSite) -> None:
    demo = made_store.entries()[0]
    answers = Answers(num_checked=10, num_correct=7, num_correct_without_draft=8)
    record_report(tmp_path, made_store.report(tmp_path / "made", demo, made_store.suites(1.5, answers=answers)))
    text = re.sub(r"\s+", " ", Page((write_site(tmp_path, [demo]).parent / "entries" / "demo.html").read_text()).text)
    assert "9 / 1 / 0 7 / 8 of 10" in text
    assert "answers right" not in words(made, "entries/demo.html")


def test_figures_of_an_enlarged_demo_say_that_they_are(tmp_path: Path, made: MadeSite) -> None:
    demo = made_store.entries()[0]
    inflated = InflatedTarget(
        demo={}, enlarged={}, layers=(), num_parameters=8_030_261_248, dtype="bfloat16", max_position_embeddings=8192
    )
    report = made_store.report(tmp_path / "made", demo, made_store.suites(1.5))
    record_report(
        tmp_path, report.model_copy(update={"lineage": report.lineage.model_copy(update={"inflated": inflated})})
    )
    text = Page((write_site(tmp_path, [demo]).parent / "entries" / "demo.html").read_text()).text
    assert "The text is the demo's, at the shape of a real model." in text
    assert "8,030,261,248 parameters" in text
    assert "at the shape of a real model" not in words(made, "entries/demo.html")


def test_after_a_rejected_build_the_champion_stays_in_front(made: MadeSite, tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    demo = made.entries[0]
    first = made_store.report(tmp_path / "first", demo, made_store.suites(1.8))
    failure = GateFailure(gate="max_regression", suite="gsm8k", measured=-0.3, required=-0.1, message="fell by 30 %")
    worse = made_store.report(tmp_path / "worse", demo, made_store.suites(1.2), (failure,), build=1)
    for report in (first, worse):
        record_report(tmp_path, report)
    record_outcome(tmp_path, "demo", Rejected(failures=(failure,)))
    index = write_site(tmp_path, [demo], champions={"demo": Champion("v1", "draft-0")})
    text = re.sub(r"\s+", " ", Page((index.parent / "entries" / "demo.html").read_text()).text)
    assert text.index("1.80×") < text.index("Users still get v1") < text.index("Gates that the last build failed")
    assert "Serve it" in text
    assert "demo made-up/Small-Target 3.00 1.80× 1.60 to 2.00 rejected" in re.sub(
        r"\s+", " ", Page(index.read_text()).text
    )


def test_a_draft_stands_beside_the_champion_of_its_time(tmp_path: Path) -> None:
    demo = made_store.entries()[0]
    change = Change(
        metric="speedup", suite="gsm8k", serving=ServingConfig(), champion=2.0, measured=1.5, low=0.7, high=0.8
    )
    comparison = Comparison(version=7, changes=(change,), not_compared=("math500 is new.",))
    report = made_store.report(tmp_path / "made", demo, made_store.suites(1.5))
    record_report(tmp_path, report.model_copy(update={"comparison": comparison}))
    text = Page((write_site(tmp_path, [demo]).parent / "entries" / "demo.html").read_text()).text
    assert "The last build against version 7" in text
    assert "gsm8k 3-1-4 1 speedup 2.00 1.50 -25.0%" in re.sub(r"\s+", " ", text)
    assert "Not compared: math500 is new." in text


def test_an_entry_that_was_never_built_says_how_to_build_it(made: MadeSite) -> None:
    text = words(made, "entries/big.html")
    assert "specbundle build --only big" in text
    assert "at least 2.50 tokens a verification step" in text


def test_text_of_a_record_never_becomes_an_element(made: MadeSite) -> None:
    for path in sorted(made.site.rglob("*.html")):
        page = Page(path.read_text())
        scripts = page.all("script")
        assert all(set(script) & {"src", "type"} for script in scripts), path
        assert all(script.get("type", "application/json") == "application/json" for script in scripts), path
        assert made_store.SCRIPT not in path.read_text()
    assert made_store.SCRIPT in words(made, "index.html")


def test_every_address_in_a_page_is_local_or_of_the_web_and_local_ones_exist(made: MadeSite) -> None:
    for path in sorted(made.site.rglob("*.html")):
        page = Page(path.read_text())
        loaded = [link["href"] for link in page.all("link")] + [s["src"] for s in page.all("script") if "src" in s]
        # Nothing is loaded from elsewhere.
        assert not [address for address in loaded if address and "://" in address]
        for address in [*loaded, *(link["href"] for link in page.all("a"))]:
            assert address
            if address.startswith("#"):
                assert f'id="{address[1:]}"' in path.read_text()
            elif "://" not in address and address != "data:,":
                assert (path.parent / address).is_file(), (path, address)


def test_the_tracker_is_linked_and_only_web_addresses_are(made: MadeSite, tmp_path: Path) -> None:
    assert COMPARISON in made.text("index.html").replace("&amp;", "&")
    evil = "javascript:alert(1)"
    assert web_url(evil) is None
    champion = Champion("v1", "draft-2", "specbundle/demo", evil)
    write_site(made.store, made.entries, champions={"demo": champion}, comparison_url=evil, out=tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*.html") if evil in path.read_text()]

    (view,) = collect(made.store, made.entries[:1], {})[:1]
    on_hub = Published(path=Path("/somewhere"), content_id="x", changed=True, url="https://example.org/draft")
    assert repository_url(view._replace(record=EntryRecord(name="demo", outcome=on_hub))) == "https://example.org/draft"
    local = on_hub.model_copy(update={"url": evil})
    assert repository_url(view._replace(record=EntryRecord(name="demo", outcome=local))) == "file:///somewhere"


def test_headings_of_tables_say_what_they_head(made: MadeSite) -> None:
    for path in sorted(made.site.rglob("*.html")):
        assert all(head.get("scope") in ("col", "row") for head in Page(path.read_text()).all("th")), path


def test_writing_again_replaces_the_pages_and_keeps_the_library(made: MadeSite, tmp_path: Path) -> None:
    store = tmp_path / "store"
    entries = made_store.make_store(store)
    first = write_site(store, entries)
    assert first == store / "site" / "index.html"
    (library,) = first.parent.glob("assets/vega-*.js")
    before = library.stat().st_mtime_ns
    (first.parent / "entries" / "big.html").write_text("old")
    assert write_site(store, entries) == first
    assert library.stat().st_mtime_ns == before
    assert "never built" in (first.parent / "entries" / "big.html").read_text()


def test_a_store_without_results_has_a_site_as_well(tmp_path: Path) -> None:
    index = write_site(tmp_path, made_store.entries())
    assert "0 / 4 drafts measured so far" in re.sub(r"\s+", " ", Page(index.read_text()).text)


def test_a_claim_of_equal_text_needs_equal_text(tmp_path: Path, made: MadeSite) -> None:
    demo = made_store.entries()[0]
    different = {"num_identical": 9, "num_near_tie": 0, "num_different": 1}
    record_report(tmp_path, made_store.report(tmp_path / "made", demo, made_store.suites(1.5, lossless=different)))
    assert "the same text" not in write_site(tmp_path, [demo]).read_text()


@pytest.mark.parametrize("name", ["theme.js", "site.js"])
def test_scripts_fetch_nothing(name: str, made: MadeSite) -> None:
    text = made.text(f"assets/{name}")
    assert not re.findall(r"fetch\(|XMLHttpRequest|import\(|https?:", text)
