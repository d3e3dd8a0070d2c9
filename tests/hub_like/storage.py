"""What the local Hub holds, in a folder: repositories with their commits, contents by sha256, collections.

    <root>/blobs/<sha256>                  every content once
    <root>/model/<namespace>/<name>.json   a repository: all commits, branches and tags; `dataset` likewise
    <root>/collections.json

Every change is one rename, so a server that is killed finds the state before or after it.
"""

import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, TypeAdapter

from specforge_core.artifacts import write_atomically

Kind = Literal["model", "dataset"]

BRANCH = "main"
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.parquet filter=lfs diff=lfs merge=lfs -text\n"
LFS_SUFFIXES = (".safetensors", ".parquet")
MAX_REGULAR_BYTES = 10_000_000


class StoredFile(BaseModel):
    """One file of a commit."""

    sha256: str
    size: int
    oid: str
    """Of its git blob, which for an LFS file is the pointer."""
    is_lfs: bool


class Commit(BaseModel):
    """The whole state of a repository."""

    oid: str
    title: str
    files: dict[str, StoredFile]


class Repository(BaseModel):
    kind: Kind
    name: str
    """With its namespace."""
    private: bool
    commits: dict[str, Commit] = {}
    """By oid, the oldest first."""
    branches: dict[str, str] = {}
    tags: dict[str, str] = {}

    @property
    def head(self) -> Commit:
        return self.commits[self.branches[BRANCH]]

    def commit(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or an oid means."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)


class CollectionItem(BaseModel):
    id: str
    type: Kind
    note: str | None = None


class Collection(BaseModel):
    slug: str
    title: str
    private: bool
    items: list[CollectionItem] = []


COLLECTIONS = TypeAdapter(dict[str, Collection])


class Storage:
    """Everything under one folder. Not for several servers at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        found = [Repository.model_validate_json(path.read_text()) for path in root.glob("*/*/*.json")]
        self.repositories = {(repository.kind, repository.name): repository for repository in found}
        path = root / "collections.json"
        self.collections = COLLECTIONS.validate_json(path.read_text()) if path.is_file() else {}

    def blob(self, sha256: str) -> Path:
        """Where a content lies, if it is there."""
        return self.root / "blobs" / sha256

    def add_blob(self, content: bytes) -> str:
        """Its sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        partial = self.blob(f"{sha256}.partial")
        partial.write_bytes(content)
        partial.replace(self.blob(sha256))
        return sha256

    def create(self, kind: Kind, name: str, *, private: bool = False) -> Repository:
        """A new repository with its first commit, as the Hub makes it."""
        repository = Repository(kind=kind, name=name, private=private)
        self.repositories[kind, name] = repository
        self.add_commit(repository, {".gitattributes": self.regular_file(GITATTRIBUTES)}, title="initial commit")
        return repository

    def regular_file(self, content: bytes) -> StoredFile:
        """A content in git itself."""
        return StoredFile(sha256=self.add_blob(content), size=len(content), oid=git_oid(content), is_lfs=False)

    def lfs_file(self, sha256: str) -> StoredFile:
        """A content that was uploaded before. Raises: FileNotFoundError if it was not."""
        size = self.blob(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return StoredFile(sha256=sha256, size=size, oid=git_oid(pointer.encode()), is_lfs=True)

    def add_commit(
        self, repository: Repository, files: dict[str, StoredFile], *, title: str, branch: str = BRANCH, oid: str = ""
    ) -> Commit:
        """The new head of the branch, with exactly these files. Args: oid: one is made up if it is empty."""
        state = "".join(f"{name} {file.sha256}\n" for name, file in sorted(files.items()))
        parent = repository.branches.get(branch, "")
        oid = oid or hashlib.sha1(f"{parent} {title}\n{state}".encode()).hexdigest()
        commit = Commit(oid=oid, title=title, files=files)
        repository.commits[oid] = commit
        repository.branches[branch] = oid
        self.save(repository)
        return commit

    def save(self, repository: Repository) -> None:
        path = self.root / repository.kind / f"{repository.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, repository.model_dump_json(indent=1))

    def add_collection(self, namespace: str, title: str, *, private: bool) -> Collection:
        """A new collection, or the one of this title."""
        words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        slug = f"{namespace}/{words}-{hashlib.sha1(f'{namespace}/{title}'.encode()).hexdigest()[:24]}"
        collection = self.collections.setdefault(slug, Collection(slug=slug, title=title, private=private))
        self.save_collections()
        return collection

    def save_collections(self) -> None:
        write_atomically(self.root / "collections.json", COLLECTIONS.dump_json(self.collections, indent=1).decode())


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(name: str, size: int) -> bool:
    return name.endswith(LFS_SUFFIXES) or size > MAX_REGULAR_BYTES


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
