"""Which entries of the manifest a build takes on. Torch-free."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from specforge_core.manifest import Manifest, ManifestEntry


class Selection(NamedTuple):
    """The entries to build, and the names of those left out, with the reason."""

    entries: tuple[ManifestEntry, ...]
    skipped: dict[str, str]


def missing_gpus(entry: ManifestEntry, num_gpus: int) -> str | None:
    """Why a host with that many GPUs cannot build the entry; None if it can."""
    wanted = entry.resources.num_gpus
    if wanted <= num_gpus:
        return None
    return f"{entry.name} needs {wanted} GPU{'s' * (wanted > 1)}, this host has {num_gpus}"


def named_entries(manifest: Manifest, names: Sequence[str]) -> tuple[ManifestEntry, ...]:
    """The entries of these names. Raises: ValueError for a name that the manifest does not have."""
    by_name = {entry.name: entry for entry in manifest.entries}
    for name in names:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(by_name)}"
            raise ValueError(f"the manifest has no entry {name!r}; {hint}")
    return tuple(by_name[name] for name in dict.fromkeys(names))


def select_entries(manifest: Manifest, *, only: Sequence[str] | None, num_gpus: int) -> Selection:
    """The entries named by `only`; without it, all that this host has the GPUs for.

    Raises: ValueError for a name that the manifest does not have, and if nothing is left to build.
    """
    if only:
        return Selection(named_entries(manifest, only), {})
    reasons = {entry.name: missing_gpus(entry, num_gpus) for entry in manifest.entries}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    entries = tuple(entry for entry in manifest.entries if entry.name not in skipped)
    if not entries:
        raise ValueError(
            f"none of the manifest's {len(skipped)} entries can be built here: {'; '.join(skipped.values())}; "
            "give an entry `resources: {num_gpus: 0}` to build it on the CPU"
        )
    return Selection(entries, skipped)
