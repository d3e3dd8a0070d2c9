"""The site in a real browser, from disk: charts, filter, sorting, colours, console, network, a phone's width."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from specforge_core.benchmark.history import record_report
from specforge_core.facts import GateFailure, Rejected
from specforge_core.ledger import record_outcome
from specforge_core.site.render import write_site
from tests.site import made_store
from tests.site.browser import Browser, find_chromium, open_browser
from tests.site.conftest import MadeSite

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no chromium and chromedriver on the PATH"),
]

DESKTOP, PHONE = 1280, 375
PAGES = (
    "index.html",
    "anchors.html",
    "entries/demo.html",
    "entries/llama.html",
    "entries/worse.html",
    "entries/big.html",
)
CHARTS = {
    "index.html": {"speedups"},
    "entries/demo.html": {
        "suites", "positions", "history-acceptance", "history-speedup", "loss", "acceptance", "lineage-graph",
    },
    "entries/llama.html": {
        "suites", "positions", "throughput", "speedup-over-load", "loss", "acceptance", "lineage-graph",
    },
}  # fmt: skip
SHOWN_ROWS = "return [...document.querySelectorAll('#entries tbody tr:not([hidden])')].map(row => row.dataset.entry)"
AXIS_LABELS = "return [...document.querySelectorAll('#speedups .role-axis-label text')].map(text => text.textContent)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(autouse=True)
def quiet(browser: Browser) -> Iterator[None]:
    """Whatever a test does: nothing on the console, nothing from a network."""
    yield
    assert browser.console() == []
    assert [address for address in browser.requests() if not address.startswith(("file:", "data:"))] == []


def colors(browser: Browser) -> dict[str, Any]:
    script = """
        const style = (node, name) => getComputedStyle(node)[name];
        const labels = [...document.querySelectorAll('.role-axis-label text')];
        return {page: style(document.body, 'backgroundColor'), label: style(labels[0], 'fill'),
                pressed: document.querySelector('.theme').getAttribute('aria-pressed')};
    """
    found: dict[str, Any] = browser.run(script)
    return found


@pytest.mark.parametrize("page", CHARTS)
def test_every_chart_is_drawn_with_marks_and_a_description(page: str, made: MadeSite, browser: Browser) -> None:
    browser.open(made.site / page, width=DESKTOP)
    script = """
        return Object.fromEntries([...document.querySelectorAll('figure.chart')].map(figure => [figure.id, {
            marks: figure.querySelectorAll('svg .role-mark path, svg .role-mark line').length,
            label: figure.querySelector('[aria-roledescription=visualization]').getAttribute('aria-label'),
            width: figure.querySelector('svg').getBoundingClientRect().width,
        }]))
    """
    drawn = browser.run(script)
    assert set(drawn) == CHARTS[page]
    for name, chart in drawn.items():
        assert chart["marks"] >= 3, name
        assert chart["label"], name
        assert chart["width"] > 300, name


def test_filters_leave_the_rows_that_match_in_table_and_chart(made: MadeSite, browser: Browser) -> None:
    browser.open(made.site / "index.html", width=DESKTOP)
    assert browser.run(SHOWN_ROWS) == ["demo", "llama", "worse", "big"]

    search = browser.driver.find_element("css selector", "input[name=text]")
    search.send_keys("LLAMA")
    assert browser.run(SHOWN_ROWS) == ["llama"]
    assert browser.run("return document.querySelector('[data-count]').textContent") == "1 of 4 drafts"
    browser.wait_for("return document.querySelectorAll('#speedups [aria-roledescription=\"circle\"]').length === 3")

    search.send_keys(Keys.CONTROL, "a", Keys.DELETE)
    status = Select(browser.driver.find_element("css selector", "select[name=status]"))
    status.select_by_visible_text("rejected")
    assert browser.run(SHOWN_ROWS) == ["worse"]
    status.select_by_visible_text("any")
    assert browser.run(SHOWN_ROWS) == ["demo", "llama", "worse", "big"]


def test_a_click_on_a_heading_sorts_and_another_one_turns_it_round(made: MadeSite, browser: Browser) -> None:
    browser.open(made.site / "index.html", width=DESKTOP)
    speedup = browser.driver.find_element("xpath", "//table[@id='entries']//button[text()='speedup']")
    # The best first; what was not measured stays last either way.
    speedup.click()
    assert browser.run(SHOWN_ROWS) == ["llama", "demo", "worse", "big"]
    # From the keyboard, too.
    speedup.send_keys(Keys.ENTER)
    assert browser.run(SHOWN_ROWS) == ["worse", "demo", "llama", "big"]
    sorts = "return [...document.querySelectorAll('#entries [aria-sort]')].map(head => head.getAttribute('aria-sort'))"
    assert browser.run(sorts) == ["ascending"]
    browser.driver.find_element("xpath", "//table[@id='entries']//button[text()='draft']").click()
    assert browser.run(SHOWN_ROWS) == ["big", "demo", "llama", "worse"]


def test_light_and_dark_follow_the_system_until_the_reader_chooses(made: MadeSite, browser: Browser) -> None:
    browser.prefer("light")
    browser.open(made.site / "index.html", width=DESKTOP)
    light = colors(browser)
    assert (light["page"], light["pressed"]) == ("rgb(253, 253, 251)", "false")

    browser.prefer("dark")
    browser.open(made.site / "index.html", width=DESKTOP)
    dark = colors(browser)
    assert (dark["page"], dark["pressed"]) == ("rgb(16, 19, 21)", "true")
    assert dark["label"] != light["label"]

    browser.driver.find_element("css selector", ".theme").click()
    browser.wait_for(
        f"return getComputedStyle(document.querySelector('.role-axis-label text')).fill === '{light['label']}'"
    )
    assert colors(browser) == light
    # The choice is kept on the next page, against the system's.
    browser.open(made.site / "entries" / "demo.html", width=DESKTOP)
    assert colors(browser) == light
    browser.run("localStorage.clear()")


@pytest.mark.parametrize("page", PAGES)
def test_no_page_scrolls_sideways_on_a_phone(page: str, made: MadeSite, browser: Browser) -> None:
    browser.open(made.site / page, width=PHONE, height=800)
    assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [PHONE, PHONE]


@pytest.fixture(scope="module")
def rejected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an entry whose last build failed four gates."""
    store, demo = tmp_path_factory.mktemp("rejected"), made_store.entries()[0]
    gates = ("min_acceptance_length", "min_speedup", "max_serving_gap", "speedup_is_possible")
    message = "gsm8k: 1.10 is below the 1.50 that is asked, so train longer, on more data, or lower it in the manifest"
    failures = tuple(
        GateFailure(gate=gate, suite="demo-arithmetic", measured=1.1, required=1.5, message=message) for gate in gates
    )
    for build, failed in enumerate(((), failures)):
        made = made_store.report(store / f"made-{build}", demo, made_store.suites(1.1, 1.3), failed, build=build)
        record_report(store, made, at=made_store.FIRST_BUILD + timedelta(days=build))
    record_outcome(store, demo.name, Rejected(failures=failures))
    return write_site(store, [demo]).parent / "entries" / "demo.html"


def test_no_table_is_cut_on_a_desktop(rejected: Path, made: MadeSite, browser: Browser) -> None:
    cut = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    for page in (rejected, *(made.site / page for page in PAGES)):
        browser.open(page, width=DESKTOP)
        assert browser.run(cut) == 0, page


@pytest.mark.parametrize(
    ("page", "table"),
    [("index.html", "#entries"), ("entries/demo.html", "#measurements"), ("entries/llama.html", "#measurements")],
)
def test_acceptance_and_speedup_are_in_sight_on_a_phone(
    page: str, table: str, made: MadeSite, browser: Browser
) -> None:
    browser.open(made.site / page, width=PHONE, height=800)
    script = f"""
        const heads = [...document.querySelectorAll('{table} thead th')];
        return Object.fromEntries(heads.map(head => [head.innerText, head.getBoundingClientRect().right]));
    """
    right = browser.run(script)
    assert max(right["acceptance length"], right["speedup"]) <= PHONE


def test_a_failed_gate_takes_no_more_room_than_its_text_on_a_phone(rejected: Path, browser: Browser) -> None:
    browser.open(rejected, width=PHONE, height=800)
    script = """
        const box = element => element.getBoundingClientRect();
        const room = box(document.querySelector('.failures .scroll')).right;
        return [...document.querySelectorAll('.failures tbody tr')].map(row => ({
            hidden: Math.max(...[...row.cells].map(cell => box(cell).right)) - room,
            height: box(row).height, cells: [...row.cells].map(cell => box(cell).height)}));
    """
    rows = browser.run(script)
    assert len(rows) == 4
    for row in rows:
        assert row["hidden"] <= 1
        # The gate, at most two lines of figures, the message, and what is between them.
        gate, suite, _, _, message = row["cells"]
        assert row["height"] < gate + 2 * suite + message + 40


def test_a_narrow_axis_has_distinct_labels(tmp_path: Path, browser: Browser) -> None:
    demo = made_store.entries()[0]
    narrow = made_store.suites(0.9, 0.93)
    measured = [
        m.model_copy(update={"speedup_low": m.speedup - 0.02, "speedup_high": 1.0}) for m in narrow.measurements
    ]
    result = narrow.model_copy(update={"measurements": tuple(measured)})
    record_report(tmp_path, made_store.report(tmp_path / "made", demo, result))
    browser.open(write_site(tmp_path, [demo]).parent / "entries" / "demo.html", width=DESKTOP)
    script = "return [...document.querySelectorAll('#suites .role-axis-label text')].map(text => text.textContent)"
    labels = [label for label in browser.run(script) if label[0].isdigit()]
    assert len(labels) >= 4
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_keeps_its_contrast(scheme: str, made: MadeSite, browser: Browser) -> None:
    browser.prefer(scheme)
    for page in ("index.html", "entries/demo.html", "entries/worse.html"):
        browser.open(made.site / page, width=DESKTOP)
        assert browser.run(LOW_CONTRAST) == [], page


# Of WCAG 2.2: text of ordinary size on the first opaque ground below it; 4.5 is its level AA.
LOW_CONTRAST = """
    const channels = (color) => {
        const values = color.match(/[\\d.]+/g).map(Number);
        return color.startsWith('color(') ? [...values.slice(0, 3).map(v => 255 * v), values[3] ?? 1] : values;
    };
    const luminance = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const color = channels(getComputedStyle(node).backgroundColor);
            if ((color[3] ?? 1) > 0.5) return color;
        }
        return [255, 255, 255];
    };
    const low = [];
    for (const node of document.querySelectorAll('body *:not(script):not(noscript):not(option)')) {
        const says = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
        if (!says || !node.getClientRects().length) continue;
        const style = getComputedStyle(node), isSvg = node.namespaceURI.endsWith('svg');
        const [a, b] = [channels(isSvg ? style.fill : style.color), ground(node)].map(luminance).sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) low.push([node.tagName, node.textContent.trim().slice(0, 40), style.color]);
    }
    return low;
"""
