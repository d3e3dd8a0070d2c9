"""A folder as a repository of the Hub, whole at every moment: one commit, read back, tagged. Torch-free.

The head of `main` is what it was before or exactly the folder; a kill at any point leaves one of the two, and the next
upload completes what is missing. A commit counts as complete once it is tagged, which is done after its files were read
back, so an upload that finds its tag has nothing to do.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, get_session, hf_hub_url
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from specforge_core.digests import digest, folder_sha256
from specforge_core.facts import Record
from specforge_core.hub.client import Hub
from specforge_core.progress import progress

Kind = Literal["model", "dataset"]
Change = Literal["added", "changed", "unchanged"]

BRANCH = "main"
# The Hub's own, which tells git which files are large.
KEPT = frozenset({".gitattributes"})
CHAMPION_TAG = "champion"
"""Moves: to each upload's commit, and back by a rollback. Whoever serves this revision serves what passed last."""
CHUNK_BYTES = 2**20


class Repository(NamedTuple):
    """A repository as it is to be."""

    name: str
    """Hub id."""
    kind: Kind = "model"
    private: bool = False

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}"


class PlannedFile(Record):
    """One file of an upload."""

    sha256: str
    size_bytes: int
    change: Change


class UploadPlan(Record):
    """What an upload would do. Made by reading alone."""

    repository: str
    kind: Kind
    private: bool
    """Only if it has to be made."""
    parent: str | None
    """The head that the commit would follow; None if there is no such repository yet."""
    files: dict[str, PlannedFile]
    deleted: tuple[str, ...]
    tag: str
    tagged: str | None
    """Commit that has this tag already."""

    @property
    def is_commit_needed(self) -> bool:
        return self.parent is None or bool(self.deleted) or any(f.change != "unchanged" for f in self.files.values())


class Uploaded(NamedTuple):
    """A repository that holds exactly the folder."""

    revision: str
    url: str
    tag: str
    changed: bool
    """False if it did so before."""


def content_tag(content_id: str) -> str:
    """The tag of a content: the same files have the same one."""
    return f"v{content_id[:12]}"


def plan_upload(hub: Hub, folder: Path, repository: Repository) -> UploadPlan:
    """What `upload_folder` would do now. Raises: as `Hub.call`; ValueError as `upload_folder`."""
    files = _local_files(folder)
    return hub.call(f"reading {repository.title}", lambda: _plan(hub, files, repository))


def upload_folder(hub: Hub, folder: Path, repository: Repository) -> Uploaded:
    """The repository, which afterwards holds exactly the files of the folder and has their tag.

    Nothing is sent if it does already. It is made if it is missing.

    Raises: ValueError if the Hub refuses, or a repository that should be private is public; ConnectionError if the Hub
    stays out of reach; RuntimeError if it gives back other bytes than it was sent, after the last complete state was
    put back at the head of `main`.
    """
    files = _local_files(folder)
    first = hub.call(f"reading {repository.title}", lambda: _plan(hub, files, repository))
    if first.parent is None:
        hub.call(f"making {repository.title}", lambda: _create(hub, repository))

    def commit() -> str:
        # Read again at each try: an earlier one may have arrived though its answer did not, or another upload may have.
        plan = _plan(hub, files, repository)
        assert plan.parent is not None
        return _commit(hub, files, plan) if plan.is_commit_needed else plan.parent

    revision = hub.call(f"committing to {repository.title}", commit) if first.is_commit_needed else first.parent
    assert revision is not None
    if first.is_commit_needed or first.tagged != revision:
        if wrong := _wrong_files(hub, repository, revision, first.files):
            _put_back(hub, repository, revision)
            raise RuntimeError(
                f"{repository.title} has other bytes than were sent, in {', '.join(wrong)} of commit {revision}; its "
                f"last complete state is `{BRANCH}` again. Upload again; if it stays so, make another repository"
            )
        set_tag(hub, repository, first.tag, revision)
    set_tag(hub, repository, CHAMPION_TAG, revision)
    prefix = "datasets/" if repository.kind == "dataset" else ""
    url = f"{hub.endpoint}/{prefix}{repository.name}"
    return Uploaded(revision=revision, url=url, tag=first.tag, changed=first.is_commit_needed)


def set_tag(hub: Hub, repository: Repository, tag: str, revision: str) -> None:
    """Have the tag at this commit. One that is elsewhere moves there.

    The Hub does that in two steps, so for a moment a reader may find none.
    """

    def move() -> None:
        there = _tags(hub, repository).get(tag)
        if there == revision:
            return
        if there is not None:
            hub.api.delete_tag(repository.name, tag=tag, repo_type=repository.kind)
        hub.api.create_tag(repository.name, tag=tag, revision=revision, repo_type=repository.kind)

    hub.call(f"tagging {repository.title} {tag}", move)


def repository_head(hub: Hub, repository: Repository) -> str | None:
    """The commit that `main` is; None if there is no such repository. For `Hub.call`.

    Raises: ValueError if it should be private and is public.
    """
    try:
        info = hub.api.repo_info(repository.name, repo_type=repository.kind, revision=BRANCH)
    except RepositoryNotFoundError:
        return None
    if repository.private and not info.private:
        raise ValueError(
            f"{repository.title} is public and `publish.private` is true; make it private in its settings on the Hub, "
            "name another repository, or set `publish.private` to false"
        )
    return info.sha


class _LocalFile(NamedTuple):
    path: Path
    sha256: str
    size_bytes: int

    def equals(self, stored: RepoFile) -> bool:
        if stored.size != self.size_bytes:
            return False
        if stored.lfs:
            return bool(stored.lfs.sha256 == self.sha256)
        return bool(stored.blob_id == git_oid(self.path.read_bytes()))


def git_oid(content: bytes) -> str:
    """What git calls a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _local_files(folder: Path) -> dict[str, _LocalFile]:
    root = folder.resolve()
    return {
        name: _LocalFile(root / name, sha256, (root / name).stat().st_size)
        for name, sha256 in folder_sha256(folder).items()
    }


def _plan(hub: Hub, files: dict[str, _LocalFile], repository: Repository) -> UploadPlan:
    name, kind = repository.name, repository.kind
    stored: dict[str, RepoFile] = {}
    tagged = None
    tag = content_tag(digest({path: file.sha256 for path, file in files.items()}))
    parent = repository_head(hub, repository)
    if parent is not None:
        stored = _stored(hub, repository, parent)
        tagged = _tags(hub, repository).get(tag)

    def planned(path: str, file: _LocalFile) -> PlannedFile:
        there = stored.get(path)
        change: Change = "added" if there is None else "unchanged" if file.equals(there) else "changed"
        return PlannedFile(sha256=file.sha256, size_bytes=file.size_bytes, change=change)

    return UploadPlan(
        repository=name,
        kind=kind,
        private=repository.private,
        parent=parent,
        files={path: planned(path, file) for path, file in files.items()},
        deleted=tuple(sorted(stored.keys() - files.keys() - KEPT)),
        tag=tag,
        tagged=tagged,
    )


def _stored(hub: Hub, repository: Repository, revision: str) -> dict[str, RepoFile]:
    tree = hub.api.list_repo_tree(repository.name, repo_type=repository.kind, revision=revision, recursive=True)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _create(hub: Hub, repository: Repository) -> None:
    hub.api.create_repo(repository.name, repo_type=repository.kind, private=repository.private, exist_ok=True)


def _commit(hub: Hub, files: dict[str, _LocalFile], plan: UploadPlan) -> str:
    """The one commit. What LFS has already is not sent again."""
    changed = [path for path, file in plan.files.items() if file.change != "unchanged"]
    made = hub.api.create_commit(
        plan.repository,
        [
            *(CommitOperationAdd(path, files[path].path) for path in changed),
            *(CommitOperationDelete(path, is_folder=False) for path in plan.deleted),
        ],
        commit_message=f"Publish {plan.tag}",
        repo_type=plan.kind,
        parent_commit=plan.parent,
    )
    return str(made.oid)


def _tags(hub: Hub, repository: Repository) -> dict[str, str]:
    refs = hub.api.list_repo_refs(repository.name, repo_type=repository.kind)
    return {tag.name: tag.target_commit for tag in refs.tags}


def _wrong_files(hub: Hub, repository: Repository, revision: str, files: dict[str, PlannedFile]) -> list[str]:
    """The files that the Hub does not give as they are here."""
    total = sum(file.size_bytes for file in files.values())
    wrong = []
    with progress(desc=f"read back {repository.name}", total=total, unit="B") as bar:
        for path, file in files.items():
            what = f"reading back {path} of {repository.title}"
            if hub.call(what, functools.partial(_sha256_at, hub, repository, revision, path)) != file.sha256:
                wrong.append(path)
            bar.update(file.size_bytes)
    return wrong


def _sha256_at(hub: Hub, repository: Repository, revision: str, path: str) -> str:
    sha256 = hashlib.sha256()
    for chunk in _read(hub, repository, revision, path):
        sha256.update(chunk)
    return sha256.hexdigest()


def _read(hub: Hub, repository: Repository, revision: str, path: str) -> Iterator[bytes]:
    """The content of a file, from the Hub and not from a cache."""
    url = hf_hub_url(repository.name, path, repo_type=repository.kind, revision=revision, endpoint=hub.endpoint)
    with get_session().stream("GET", url, headers=build_hf_headers(token=hub.api.token)) as response:
        if response.is_error:
            # Its text is part of the message.
            response.read()
        hf_raise_for_status(response)
        yield from response.iter_bytes(CHUNK_BYTES)


def _put_back(hub: Hub, repository: Repository, wrong: str) -> None:
    """Make the head what the last complete commit is, or empty without one, unless it has moved on from `wrong`.

    Raises: RuntimeError if that cannot be read either; then nothing changes.
    """
    name, kind = repository.name, repository.kind

    def old_file(revision: str, file: RepoFile) -> CommitOperationCopy | CommitOperationAdd:
        if file.lfs:
            return CommitOperationCopy(file.path, file.path, src_revision=revision)
        content = b"".join(_read(hub, repository, revision, file.path))
        if git_oid(content) != file.blob_id:
            raise RuntimeError(
                f"{repository.title} can be read back neither at commit {wrong} nor at {revision}, its last complete "
                f"state, where {file.path} has other bytes than it should; `{BRANCH}` is {wrong}"
            )
        return CommitOperationAdd(file.path, content)

    def put_back() -> None:
        if hub.api.repo_info(name, repo_type=kind, revision=BRANCH).sha != wrong:
            return
        complete = _tags(hub, repository).get(CHAMPION_TAG)
        old = _stored(hub, repository, complete) if complete else {}
        new = _stored(hub, repository, wrong)
        differing = [f for path, f in old.items() if path not in new or new[path].blob_id != f.blob_id]
        hub.api.create_commit(
            name,
            [
                *(old_file(str(complete), file) for file in differing),
                *(CommitOperationDelete(path, is_folder=False) for path in sorted(new.keys() - old.keys() - KEPT)),
            ],
            commit_message=f"Put back {complete or 'nothing'}",
            repo_type=kind,
            parent_commit=wrong,
        )

    hub.call(f"putting back {repository.title}", put_back)
