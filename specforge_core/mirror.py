"""Artifacts under a URL that fsspec knows (`s3://`, `gs://`, `file://`), where several hosts share them. Torch-free.

    <url>/<stage>/<key>/<content id>/<file>
    <url>/<stage>/<key>/artifact.json          written last, so an artifact is whole or absent here as well

Files lie under their content id: of two hosts that build one key, each writes its own content, or the same bytes. The
record that is written last counts, and names files that nobody else wrote.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs
from fsspec.utils import get_protocol
from pydantic import ValidationError

from specforge_core.artifacts import NOT_CONTENT, PROGRESS_DIRECTORY, RECORD_NAME, Artifact, FactsT, write_atomically
from specforge_core.digests import file_sha256
from specforge_core.process import ending
from specforge_core.progress import progress

logger = logging.getLogger(__name__)

NUM_AT_ONCE = 8
"""Files on their way at once."""


class Mirror:
    """The artifacts under one URL."""

    def __init__(self, url: str) -> None:
        """Raises: ValueError for a URL whose protocol is unknown, or whose package is not installed."""
        self.url = url.rstrip("/")
        try:
            # Object stores have no folders, and s3fs refuses the option.
            on_disk = {"auto_mkdir": True} if get_protocol(self.url) in ("file", "local") else {}
            # A remembered listing would hide what other hosts have written since.
            self._files, root = url_to_fs(self.url, use_listings_cache=False, **on_disk)
        except ImportError as error:
            raise ValueError(f"{url}: {error}; for s3:// that is `pip install 'specbundle[s3]'`") from error
        self._root: str = root
        self._refused: set[tuple[str, str]] = set()
        """Artifacts whose files here are not what their record says: the next push replaces them all."""

    def pull(self, stage: str, key: str, facts_type: type[FactsT], directory: Path) -> bool:
        """Whether this artifact now lies in `directory`, verified; what an interrupted pull left there is kept.

        False if there is none, or one whose files are not what its record says, which is reported.
        """
        place = f"{self._root}/{stage}/{key}"
        try:
            record = self._files.cat_file(f"{place}/{RECORD_NAME}")
        except FileNotFoundError:
            return False
        try:
            artifact = Artifact[facts_type].model_validate_json(record)  # type: ignore[valid-type]
        except ValidationError as error:
            logger.warning("%s/%s/%s has an unreadable %s: %s", self.url, stage, key, RECORD_NAME, error)
            return False
        if reason := self._fetch(artifact, f"{place}/{artifact.content_id}", directory):
            logger.warning("%s/%s/%s is refused and built again: %s", self.url, stage, key, reason)
            self._refused.add((stage, key))
            shutil.rmtree(directory, ignore_errors=True)
            return False
        write_atomically(directory / RECORD_NAME, record.decode())
        return True

    def push(self, artifact: Artifact[Any]) -> None:
        """Have the artifact here, whole. What an interrupted push has sent already is not sent again."""
        stage, key, content_id = artifact.stage, artifact.key, artifact.content_id
        place = f"{self._root}/{stage}/{key}"
        is_refused = (stage, key) in self._refused
        if not is_refused and self._content_id(place) == content_id:
            return
        there = {} if is_refused else self._sizes(f"{place}/{content_id}")
        paths = [path for path in artifact.path.rglob("*") if path.is_file()]
        here = {path.relative_to(artifact.path).as_posix(): path.stat().st_size for path in paths}
        unsent = {
            name: size_bytes for name, size_bytes in here.items() if _is_sent(name) and there.get(name) != size_bytes
        }

        def send(name: str) -> None:
            self._files.put_file(str(artifact.path / name), f"{place}/{content_id}/{name}")

        _transfer(send, unsent, desc=f"push {stage}/{key}")
        self._files.pipe_file(f"{place}/{RECORD_NAME}", (artifact.path / RECORD_NAME).read_bytes())
        self._refused.discard((stage, key))

    def _fetch(self, artifact: Artifact[Any], place: str, directory: Path) -> str | None:
        """None once the files of the artifact at `place` are in `directory`; else why they are refused."""
        if not place.startswith(f"{self._root}/{artifact.stage}/{artifact.key}/"):
            return f"its record is that of {artifact.stage}/{artifact.key}"
        outside = [name for name in (artifact.content_id, *artifact.files) if _leaves(name)]
        if outside:
            return f"its record names {outside[0]}, outside of its folder"
        # No stage goes on from what somebody else may have written, such as a training's checkpoints.
        if foreign := [name for name in artifact.files if name.partition("/")[0] in NOT_CONTENT]:
            return f"its record names {foreign[0]}, which is no content"
        contents = {name: file.size_bytes for name, file in artifact.files.items()}
        # Logs and the like: useful, but no part of the content, so without a digest.
        notes = {
            name: size_bytes
            for name, size_bytes in self._sizes(place).items()
            if name not in contents and name.partition("/")[0] in NOT_CONTENT and _is_sent(name) and not _leaves(name)
        }
        wrong: list[str] = []

        def is_right(name: str) -> bool:
            path, file = directory / name, artifact.files[name]
            return path.is_file() and path.stat().st_size == file.size_bytes and file_sha256(path) == file.sha256

        def receive(name: str) -> None:
            if name in contents and is_right(name):
                return
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                self._files.get_file(f"{place}/{name}", str(directory / name))
            except FileNotFoundError:
                (directory / name).unlink(missing_ok=True)
            if name in contents and not is_right(name):
                wrong.append(name)

        directory.mkdir(parents=True, exist_ok=True)
        _transfer(receive, contents | notes, desc=f"pull {artifact.stage}/{artifact.key}")
        if wrong:
            return f"{len(wrong)} of {len(contents)} files are missing or have another sha256, such as {min(wrong)}"
        return None

    def _content_id(self, place: str) -> str | None:
        """The content id of the whole artifact at `place`; None if there is none that can be read."""
        try:
            return str(Artifact[Any].model_validate_json(self._files.cat_file(f"{place}/{RECORD_NAME}")).content_id)
        except (FileNotFoundError, ValidationError):
            return None

    def _sizes(self, place: str) -> dict[str, int]:
        """Bytes of each file at `place`, by its name there."""
        try:
            found = self._files.find(place, detail=True)
        except FileNotFoundError:
            return {}
        return {name.removeprefix(f"{place}/"): info["size"] for name, info in found.items()}


def _is_sent(name: str) -> bool:
    """Whether a file of an artifact goes to the mirror on its own; the record is written by itself, last."""
    return name != RECORD_NAME and name.partition("/")[0] != PROGRESS_DIRECTORY


def _leaves(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _transfer(move: Callable[[str], None], sizes: Mapping[str, int], *, desc: str) -> None:
    """Move each file, several at once; the first that fails stops those that have not begun."""
    total_bytes, started_at = sum(sizes.values()), time.monotonic()

    def move_one(name: str) -> str:
        if ending.is_set():
            raise InterruptedError(f"stopped during {desc}")
        move(name)
        return name

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool, progress(desc=desc, total=total_bytes, unit="B") as bar:
        moves = [pool.submit(move_one, name) for name in sizes]
        try:
            for done in as_completed(moves):
                bar.update(sizes[done.result()])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    elapsed_s = time.monotonic() - started_at
    logger.info("%s: %d files, %.2f GiB in %.1f s", desc, len(sizes), total_bytes / 2**30, elapsed_s)
