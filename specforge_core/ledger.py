"""What was last built of each manifest entry: `<store>/entries/<name>.json`. Torch-free.

Artifacts are stored by what they were made from and know no entry. This file says which of them an entry used last, so
that `plan` can tell what changed and `report` needs no build.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from specforge_core.artifacts import Artifact, Store, write_atomically
from specforge_core.facts import Published, Record, Rejected, Withheld
from specforge_core.stages import SPECS

Outcome = Published | Rejected | Withheld


class EntryRecord(Record):
    """The newest artifact of each stage of one entry, and how its last whole build ended."""

    name: str
    keys: dict[str, str] = Field(default_factory=dict)
    """Store key by stage."""
    outcome: Outcome | None = None
    """None until a build has reached its end with just these artifacts."""
    updated_at: datetime | None = None


def _path(store: Path, name: str) -> Path:
    return store / "entries" / f"{name}.json"


def load_entry_record(store: Path, name: str) -> EntryRecord:
    """The record of an entry; an empty one before its first build."""
    try:
        return EntryRecord.model_validate_json(_path(store, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return EntryRecord(name=name)


def _save(store: Path, record: EntryRecord) -> None:
    path = _path(store, record.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    stamped = record.model_copy(update={"updated_at": datetime.now(UTC)})
    write_atomically(path, stamped.model_dump_json(indent=1) + "\n")


def last_artifact(store: Store, name: str, stage: str) -> Artifact[Any] | None:
    """The artifact of this stage that the entry used last; None if there was none or it is gone."""
    key = load_entry_record(store.root, name).keys.get(stage)
    return None if key is None else store.find(stage, key, SPECS[stage].facts_type)


def record_stage(store: Path, name: str, *, stage: str, key: str) -> None:
    """Remember that the entry's build used this artifact; an outcome that rests on another one is forgotten."""
    record = load_entry_record(store, name)
    if record.keys.get(stage) != key:
        _save(store, record.model_copy(update={"keys": {**record.keys, stage: key}, "outcome": None}))


def record_outcome(store: Path, name: str, outcome: Outcome) -> None:
    """Remember how the entry's build ended."""
    _save(store, load_entry_record(store, name).model_copy(update={"outcome": outcome}))
