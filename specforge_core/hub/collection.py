"""A collection of the Hub that lists what was published, each with a note. Torch-free."""

import re

from huggingface_hub import Collection, CollectionItem

from specforge_core.facts import Record
from specforge_core.hub.client import Hub
from specforge_core.hub.upload import Repository
from specforge_core.manifest_publish import COLLECTION_PATTERN

MAX_NOTE_CHARACTERS = 500
"""Of the Hub."""


class CollectionChange(Record):
    """What listing a repository would change."""

    collection: str
    """Title or slug."""
    item: str
    old_note: str | None
    """None if it is not listed, or has no note."""
    new_note: str
    is_needed: bool


def plan_listing(hub: Hub, collection: str, repository: Repository, note: str) -> CollectionChange:
    """What `list_in_collection` would change now. One named by its title is only looked for by that at the owner's."""
    note = note[:MAX_NOTE_CHARACTERS]
    found = hub.call(f"reading collection {collection}", lambda: _find(hub, collection, repository))
    item = found and _item(found, repository)
    old_note = item.note if item else None
    return CollectionChange(
        collection=collection,
        item=repository.name,
        old_note=old_note,
        new_note=note,
        is_needed=item is None or old_note != note,
    )


def list_in_collection(hub: Hub, collection: str, repository: Repository, note: str) -> str:
    """The address of the collection, which afterwards lists the repository with this note.

    Args: collection: a slug; or a title, of a collection that is made in the repository's namespace if it is missing.
    Raises: as `Hub.call`.
    """
    note = note[:MAX_NOTE_CHARACTERS]

    def change() -> Collection:
        there = _find(hub, collection, repository) or hub.api.create_collection(
            collection, namespace=_namespace(repository), private=repository.private, exists_ok=True
        )
        item = _item(there, repository)
        if item is None:
            return hub.api.add_collection_item(
                there.slug, item_id=repository.name, item_type=repository.kind, note=note, exists_ok=True
            )
        if item.note != note:
            hub.api.update_collection_item(there.slug, item.item_object_id, note=note)
        return there

    return hub.call(f"listing {repository.title} in collection {collection}", change).url


def _find(hub: Hub, collection: str, repository: Repository) -> Collection | None:
    if re.fullmatch(COLLECTION_PATTERN, collection):
        return hub.api.get_collection(collection)
    # A list shows some of the items only.
    owned = hub.api.list_collections(owner=_namespace(repository))
    slug = next((listed.slug for listed in owned if listed.title == collection), None)
    return hub.api.get_collection(slug) if slug else None


def _item(collection: Collection, repository: Repository) -> CollectionItem | None:
    wanted = (repository.kind, repository.name)
    return next((item for item in collection.items if (item.item_type, item.item_id) == wanted), None)


def _namespace(repository: Repository) -> str:
    return repository.name.partition("/")[0]
