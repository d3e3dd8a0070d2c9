"""The site of results, with the champions that the registry has and a link to the tracker."""

import logging
from collections.abc import Sequence
from pathlib import Path

from specforge_core.manifest import ManifestEntry
from specforge_core.site.collect import Champion
from specforge_core.site.render import write_site as write_pages
from tasks.registry import champions
from tasks.tracking import comparison_url, tracking_uri

logger = logging.getLogger(__name__)

LOCAL_TRACKER = "sqlite:///"
SITE_TAG = "specbundle.site"
"""On tracked runs: where their results are shown."""


def write_site(store: Path, entries: Sequence[ManifestEntry], *, out: Path | None = None) -> Path:
    """The first page of the store's site, written anew. Args: out: as `specforge_core.site.render.write_site` says."""
    if not _is_tracked(store):
        return write_pages(store, entries, out=out)
    known = {
        name: Champion(f"v{version.number}", version.draft, version.repository, version.url)
        for name, version in champions(store).items()
    }
    return write_pages(store, entries, champions=known, comparison_url=comparison_url(store), out=out)


def update_site(store: Path, entries: Sequence[ManifestEntry]) -> Path | None:
    """The same at the end of a build, which pages are no reason to lose: None, with a warning, if they fail."""
    try:
        return write_site(store, entries)
    except Exception as error:
        logger.warning("the site is not written, and the build goes on: %s: %s", type(error).__name__, error)
        return None


def _is_tracked(store: Path) -> bool:
    """Whether there is a tracker to ask: asking for a database that is not there would create it."""
    uri = tracking_uri(store)
    return not uri.startswith(LOCAL_TRACKER) or Path(uri.removeprefix(LOCAL_TRACKER)).is_file()
