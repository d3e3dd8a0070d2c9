"""What an entry publishes on the Hub: repositories, and the collection that lists them. Torch-free."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from specforge_core.facts import Record
from specforge_core.hub.client import Hub
from specforge_core.hub.collection import CollectionChange, list_in_collection, plan_listing
from specforge_core.hub.upload import Repository, Uploaded, UploadPlan, plan_upload, upload_folder


class Part(NamedTuple):
    """One repository, the folder that it is to be, and what the collection says of it."""

    repository: Repository
    folder: Path
    note: str


class PublishPlan(Record):
    """What publishing an entry would change."""

    entry: str
    folder: Path
    """With exactly the files that would be published."""
    files: Mapping[str, str]
    """Their sha256, by name."""
    differing: tuple[str, ...]
    """Files that are not so in the folder that is published now, or are there beside them."""
    endpoint: str | None
    """Of the Hub; None if the entry stays in its folder."""
    uploads: tuple[UploadPlan, ...] = ()
    """In their order."""
    listings: tuple[CollectionChange, ...] = ()


def publish_parts(hub: Hub, parts: Sequence[Part], collection: str | None) -> Uploaded:
    """The last part, uploaded after the others, each whole and listed. What is there already is left alone.

    Raises: as `upload_folder`. Publishing again goes on from what is done.
    """
    for part in parts:
        uploaded = upload_folder(hub, part.folder, part.repository)
        if collection:
            list_in_collection(hub, collection, part.repository, part.note)
    return uploaded


def plan_parts(
    hub: Hub, parts: Sequence[Part], collection: str | None
) -> tuple[tuple[UploadPlan, ...], tuple[CollectionChange, ...]]:
    """What `publish_parts` would do now."""
    uploads = tuple(plan_upload(hub, part.folder, part.repository) for part in parts)
    if collection is None:
        return uploads, ()
    return uploads, tuple(plan_listing(hub, collection, part.repository, part.note) for part in parts)
