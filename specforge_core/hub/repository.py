"""A folder laid out exactly as the draft's repository on the Hub would be, and replaced as a whole.

    <root>/demo                              -> .versions/demo/<content id>-<random>      what readers open
    <root>/.versions/demo/<...>/             the files
    <root>/.versions/demo.lock

A new version is written beside the current one; then its link is renamed onto the current link, which is one atomic
step. So a reader sees all old or all new files, and a kill at any point leaves a working link. What a kill leaves
behind is a folder that no link names, and the next publishing of this name removes it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from huggingface_hub import try_to_load_from_cache

from specforge_core.artifacts import BuildArtifacts
from specforge_core.benchmark.plots import png_plots
from specforge_core.benchmark.report import EntryReport
from specforge_core.digests import digest, file_sha256, folder_sha256
from specforge_core.facts import Published
from specforge_core.hub.card import LICENSE_FOLDER, LICENSE_NAME, PLOTS_FOLDER, model_card
from specforge_core.manifest_sections import NAME_PATTERN
from specforge_core.stages import ResolvedTarget

VERSIONS = ".versions"
SHIPPED_LICENSE = "apache-2.0"
LICENSE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


def repository_files(report: EntryReport, artifacts: BuildArtifacts, target: ResolvedTarget) -> dict[str, Path | bytes]:
    """The files of the draft's repository, by name: where each lies now, or its content."""
    licenses = license_files(target)
    own_license = draft_license(report.lineage.entry.publish.license, licenses)
    files: dict[str, Path | bytes] = {
        **{name: artifacts.draft.path / name for name in artifacts.draft.files},
        **{f"{LICENSE_FOLDER}/{path.name}": path for path in licenses},
        **({LICENSE_NAME: own_license} if own_license else {}),
        **{f"{PLOTS_FOLDER}/{name}": content for name, content in png_plots(report.benchmark).items()},
        "lineage.json": _json_bytes(report.lineage.model_dump(mode="json")),
        "benchmark_result.json": _json_bytes(report.benchmark.model_dump(mode="json")),
    }
    target_path = target.model if target.revision is None else None
    return files | {"README.md": model_card(report, files.keys(), target_path=target_path).encode()}


def draft_license(name: str, target_licenses: Sequence[Path]) -> bytes | None:
    """The text of a draft's licence: the one that comes with this package, or else the target's own, as a licence that
    is not free is its makers' words; None if there is neither."""
    if name == SHIPPED_LICENSE:
        return resources.files("specforge_core.hub").joinpath("licenses", f"{SHIPPED_LICENSE}.txt").read_bytes()
    return next((path.read_bytes() for path in target_licenses if path.stem == LICENSE_NAME), None)


def license_files(target: ResolvedTarget) -> list[Path]:
    """The licence files that came with the target: from its folder, or from the Hub's cache on this machine."""
    if target.revision is None:
        found = [Path(target.model) / name for name in LICENSE_NAMES]
    else:
        cached = [try_to_load_from_cache(target.model, name, revision=target.revision) for name in LICENSE_NAMES]
        found = [Path(path) for path in cached if isinstance(path, str)]
    return [path for path in found if path.is_file()]


def publish_directory(
    root: Path,
    name: str,
    files: Mapping[str, Path | bytes],
    *,
    recorded: Mapping[str, str] = MappingProxyType({}),
) -> Published:
    """The folder `<root>/<name>`, which afterwards holds exactly these files.

    If it holds them already, nothing is written and `changed` is False.

    Args: files: by name within the folder, `/` between its parts: where the file lies now, or its content; recorded:
    the sha256 that files had when they were made, by the same names.
    Raises: ValueError for a name that would leave its folder, for a file that changed since it was made, or if
    something else than a published folder is in the way; FileNotFoundError for a file that does not exist.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{name!r} cannot name a published folder; it must match {NAME_PATTERN}")
    for file_name in files:
        _check_file_name(file_name)
    link = root / name
    if link.exists() and not link.is_symlink():
        raise ValueError(f"{link} is not a published folder, which would be a link into {VERSIONS}; move it away")
    wanted = {file_name: _content_sha256(content) for file_name, content in files.items()}
    for file_name, content in files.items():
        sha256 = wanted[file_name]
        if isinstance(content, Path) and sha256 != recorded.get(file_name, sha256):
            raise ValueError(
                f"{content} has changed since it was made: its sha256 is {sha256} and was {recorded[file_name]}; "
                "remove it and build again: its stage makes it anew"
            )
    content_id = digest(wanted)
    versions = root / VERSIONS / name
    versions.mkdir(parents=True, exist_ok=True)
    with _locked(root / VERSIONS / f"{name}.lock"):
        changed = not link.is_dir() or folder_sha256(link) != wanted
        if changed:
            version = Path(tempfile.mkdtemp(prefix=f"{content_id}-", dir=versions))
            write_files(version, files)
            switch_link(link, version)
        remove_other_versions(link, versions)
    return Published(path=link.absolute(), content_id=content_id, changed=changed)


def write_files(directory: Path, files: Mapping[str, Path | bytes]) -> None:
    """Write the files and wait until they are on disk: the link must not survive a power cut that they do not."""
    # It was made for its owner alone, but a server may run as someone else.
    directory.chmod(0o755)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            shutil.copyfile(content, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def switch_link(link: Path, version: Path) -> None:
    """Point `link` at `version`, in one step. The link is relative, so the whole root may be moved."""
    staged = version.with_name(f"{version.name}.link")
    staged.symlink_to(version.relative_to(link.parent))
    staged.replace(link)


def remove_other_versions(link: Path, versions: Path) -> None:
    """Remove earlier versions, and what an interrupted publishing left."""
    current_name = link.readlink().name
    for path in versions.iterdir():
        if path.is_symlink():
            path.unlink()
        elif path.name != current_name:
            shutil.rmtree(path)


def _check_file_name(name: str) -> None:
    path = PurePosixPath(name)
    # `str(path) != name` catches `a//b`, `./a` and `a/.`, which would write one file under two names.
    if path.is_absolute() or not path.parts or ".." in path.parts or str(path) != name:
        raise ValueError(f"{name!r} cannot name a file of a repository; use a relative path without `..`")


def _content_sha256(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep two publishings of one name apart; the kernel lets go when the holder dies."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
