"""Take the pictures of the README: `python -m tests.site.pictures --store .specbundle`, from that store's own results.

Writes `reports/pictures/*.png`. Needs Chromium and its driver, and Pillow to make the files small.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

from PIL import Image

from specforge_core.manifest import Manifest
from tasks.site import write_site
from tests.site.browser import open_browser

ROOT = Path(__file__).parents[2]
MAX_BYTES = 250_000
WIDTH = 1280
SCALE = 1.5
NUM_COLORS = 128


class Picture(NamedTuple):
    """One window on one page."""

    name: str
    page: str
    scheme: Literal["light", "dark"]
    width: int
    height: int
    scroll_to: str = "main"
    """A selector: the element at the top."""


PICTURES = (
    Picture("site-overview", "index.html", "light", WIDTH, 1000),
    Picture("site-entry", "entries/demo.html", "dark", WIDTH, 1150),
    Picture("site-training", "entries/demo.html", "light", WIDTH, 1110, "#training"),
)


def main() -> None:
    """Write every picture."""
    parser = argparse.ArgumentParser(description="Take the pictures of the README.")
    parser.add_argument("--store", type=Path, default=ROOT / ".specbundle", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "pictures", help="default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, open_browser() as browser:
        entries = Manifest.load(ROOT / "bundle_manifest.yaml").entries
        site = write_site(args.store, entries, out=Path(folder)).parent
        for picture in PICTURES:
            path = args.out / f"{picture.name}.png"
            browser.prefer(picture.scheme)
            browser.open(site / picture.page, width=picture.width, height=picture.height, scale=SCALE)
            if picture.scroll_to != "main":
                browser.run(f"document.querySelector({picture.scroll_to!r}).scrollIntoView({{behavior: 'instant'}})")
            browser.picture(path)
            shrink(path)


def shrink(path: Path) -> None:
    """Make a picture smaller: few colours are enough for text and lines."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(NUM_COLORS, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    size = path.stat().st_size
    assert size <= MAX_BYTES, f"{path} has {size:,} bytes, more than {MAX_BYTES:,}; lower SCALE or NUM_COLORS"


if __name__ == "__main__":
    main()
