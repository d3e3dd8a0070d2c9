"""A headless Chromium that opens pages from disk, for tests of the site and its pictures. Needs the extra `dev`."""

import base64
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from selenium import webdriver
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.support.wait import WebDriverWait

TIMEOUT_S = 30
CHARTS_DRAWN = (
    "return [...document.querySelectorAll('figure.chart')].every(f => f.dataset.drawn && f.querySelector('svg'))"
)


def find_chromium() -> tuple[str, str] | None:
    """The browser and its driver; None where one of them is not installed."""
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def open_browser() -> Iterator["Browser"]:
    """A browser of its own profile, gone at the end. Raises: FileNotFoundError where there is none."""
    found = find_chromium()
    if found is None:
        raise FileNotFoundError(
            "no chromium and chromedriver on the PATH; install the packages chromium, chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(found[1]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """One tab."""

    def __init__(self, driver: WebDriver) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int, height: int = 900, scale: float = 1.0) -> None:
        """Load a page and wait until every chart of it is drawn. Args: as of `resize`."""
        self.resize(width=width, height=height, scale=scale)
        self.driver.get(page.absolute().as_uri())
        self.wait_for(CHARTS_DRAWN)

    def resize(self, *, width: int, height: int, scale: float) -> None:
        """Args: width, height: of the window, in CSS pixels; scale: pixels for each of them."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
        self._command("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: Literal["light", "dark"]) -> None:
        """What the system asks for, as the page sees it."""
        self._command("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})

    def run(self, script: str) -> Any:
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(script)

    def wait_for(self, condition: str) -> None:
        """Return once this JavaScript returns true. Raises: TimeoutException if it does not."""
        WebDriverWait(self.driver, TIMEOUT_S, poll_frequency=0.05).until(lambda driver: self.run(condition))

    def console(self) -> list[str]:
        """Errors and warnings since the last call."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def picture(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        # The window's own transitions.
        time.sleep(0.3)
        shot = self._command("Page.captureScreenshot", {"format": "png"})
        path.write_bytes(base64.b64decode(shot["data"]))

    def _command(self, name: str, parameters: dict[str, Any]) -> Any:
        return self.driver.execute_cdp_cmd(name, parameters)
