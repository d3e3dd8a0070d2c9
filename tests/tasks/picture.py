"""Take the README's picture of the comparison page: `python -m tests.tasks.picture --store .specbundle`.

Writes `reports/pictures/mlflow.png`, from that store's own runs. Needs what `tests.site.pictures` does.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.tracking import comparison_url, tracking_uri
from tests.site.browser import open_browser
from tests.site.pictures import ROOT
from tests.tasks.mlflow_page import mlflow_page

WIDTH, HEIGHT, SCALE = 1440, 900, 1.0
DRAWN = """
const charts = [...document.querySelectorAll('.js-plotly-plot')];
return charts.length > 3 && charts.every(chart => chart.querySelector('.bars path, .scatterlayer path'));
"""
# Shown under a pointer alone, which this browser does not have.
HIDE_TOOLS = """
const style = document.createElement('style');
style.textContent = '.modebar {display: none}';
document.head.append(style);
"""
# The page opens a panel of its own beside the charts.
CLOSE_PANEL = """
const close = document.querySelector('[data-component-id="mlflow.assistant.chat_panel.close"]');
close?.click();
return !close;
"""


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description="Take the README's picture of the comparison page.")
    parser.add_argument("--store", type=Path, default=ROOT / ".specbundle", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "pictures" / "mlflow.png")
    args = parser.parse_args()
    uri = tracking_uri(args.store)
    with TemporaryDirectory() as folder, mlflow_page(uri, directory=Path(folder)) as port, open_browser() as browser:
        url = comparison_url(args.store, port=port)
        if url is None:
            raise SystemExit(f"{uri} has no runs of entries; `specbundle build` makes some")
        browser.resize(width=WIDTH, height=HEIGHT, scale=SCALE)
        browser.driver.get(url)
        browser.wait_for(DRAWN)
        browser.run(CLOSE_PANEL)
        browser.run(HIDE_TOOLS)
        # Closing gives the charts more room, which they take in steps.
        time.sleep(3)
        browser.wait_for(DRAWN)
        browser.picture(args.out)


if __name__ == "__main__":
    main()
