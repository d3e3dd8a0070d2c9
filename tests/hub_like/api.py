"""The part of the Hub's HTTP API that publishing and reading back use: from a request to an answer, over a `Storage`.

Paths, fields, status codes and error headers are those that huggingface_hub 1.31 to 2.4 sends and understands.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs

import yaml

from tests.hub_like.storage import (
    BRANCH,
    Collection,
    CollectionItem,
    Commit,
    Kind,
    Repository,
    Storage,
    StoredFile,
    is_lfs,
    now,
)

Role = Literal["read", "write", "admin", "fineGrained"]

REPO = r"(?P<name>[^/]+/[^/]+)"
SLUG = r"(?P<slug>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
API = rf"/api/(?P<kind>model|dataset)s/{REPO}"
FILES = rf"/(?P<datasets>datasets/)?{REPO}"


class Answer(NamedTuple):
    status: int = 200
    body: Any = None
    """Bytes as they are, anything else as JSON."""
    headers: Mapping[str, str] = {}


class Refusal(Exception):
    """A request that gets an error. The code is the Hub's own, in a header that its client reads."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.answer = Answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


@dataclass
class Account:
    """Who owns a token, and what it may do."""

    user: str = "tester"
    role: Role = "write"
    organizations: Mapping[str, Role] = field(default_factory=lambda: {"specbundle": "admin"})

    def may_write(self, namespace: str) -> bool:
        roles = {self.user: "admin", **self.organizations}
        return self.role != "read" and roles.get(namespace) in ("write", "admin")


class Request(NamedTuple):
    method: str
    path: str
    body: bytes
    account: Account | None
    query: Mapping[str, str]
    endpoint: str
    """URL of the server, as the client reached it."""

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class HubApi:
    """Answers requests. Not for several threads at once."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.num_uploads = 0
        """LFS objects that arrived whole."""

    def answer(self, request: Request) -> Answer:
        try:
            for method, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, request.path)
                if match and method == request.method:
                    return handle(self, request, **match.groupdict())
            raise Refusal(404, f"not served: {request.method} {request.path}")
        except Refusal as refusal:
            return refusal.answer

    def whoami(self, request: Request) -> Answer:
        if request.account is None:
            raise Refusal(401, "Invalid username or password.")
        account = request.account
        organizations = [{"type": "org", "name": n, "roleInOrg": role} for n, role in account.organizations.items()]
        token = {"displayName": "a token", "role": account.role}
        return Answer(
            body={"type": "user", "name": account.user, "orgs": organizations, "auth": {"accessToken": token}}
        )

    def create(self, request: Request) -> Answer:
        wanted = request.json()
        kind: Kind = wanted.get("type") or "model"
        name = f"{wanted['organization']}/{wanted['name']}"
        self._check_write(request, name)
        url = f"{request.endpoint}/{'datasets/' * (kind == 'dataset')}{name}"
        if (kind, name) in self.storage.repositories:
            return Answer(409, {"error": "You already created this repo", "url": url})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.storage.create(kind, name, private=private)
        return Answer(body={"url": url, "name": name})

    def validate_yaml(self, request: Request) -> Answer:
        found = re.match(r"---\n(.*?)\n---\n", request.json()["content"], flags=re.DOTALL)
        try:
            yaml.safe_load(found[1] if found else "")
        except yaml.YAMLError as error:
            return Answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        return Answer(body={"errors": [], "warnings": []})

    def info(self, request: Request, kind: Kind, name: str, revision: str | None = None) -> Answer:
        repository = self._repository(request, kind, name)
        commit = self._commit(repository, revision)
        about = {"id": name, "sha": commit.oid, "private": repository.private, "tags": [], "downloads": 0}
        return Answer(body=about | {"siblings": [{"rfilename": path} for path in sorted(commit.files)]})

    def refs(self, request: Request, kind: Kind, name: str) -> Answer:
        repository = self._repository(request, kind, name)

        def listed(what: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": ref, "ref": f"refs/{what}/{ref}", "targetCommit": oid} for ref, oid in refs.items()]

        heads, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        return Answer(body={"branches": heads, "converts": [], "tags": tags})

    def tree(self, request: Request, kind: Kind, name: str, revision: str, folder: str | None = None) -> Answer:
        commit = self._commit(self._repository(request, kind, name), revision)
        inside = {path: file for path, file in commit.files.items() if path.startswith(folder or "")}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return Answer(body=[_entry(path, file) for path, file in sorted(inside.items())])

    def paths_info(self, request: Request, kind: Kind, name: str, revision: str) -> Answer:
        commit = self._commit(self._repository(request, kind, name), revision)
        paths = parse_qs(request.body.decode()).get("paths", [])
        return Answer(body=[_entry(path, commit.files[path]) for path in paths if path in commit.files])

    def preupload(self, request: Request, kind: Kind, name: str, revision: str) -> Answer:
        repository = self._repository(request, kind, name)
        self._check_write(request, name)
        there = self._commit(repository, revision).files
        return Answer(body={"files": [_upload_mode(file, there.get(file["path"])) for file in request.json()["files"]]})

    def lfs_batch(self, request: Request, datasets: str | None, name: str) -> Answer:
        self._repository(request, "dataset" if datasets else "model", name)
        self._check_write(request, name)
        objects = []
        for wanted in request.json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.storage.blob(wanted["oid"]).is_file():
                answer["actions"] = {"upload": {"href": f"{request.endpoint}/_lfs/{wanted['oid']}"}}
            objects.append(answer)
        return Answer(body={"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, sha256: str) -> Answer:
        # Whoever has the address may write, as with the Hub's own: a signature stands in for the token.
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise Refusal(400, "the content's sha256 is another")
        self.storage.add_blob(request.body)
        self.num_uploads += 1
        return Answer()

    def commit(self, request: Request, kind: Kind, name: str, revision: str) -> Answer:
        repository = self._repository(request, kind, name)
        self._check_write(request, name)
        head = self._commit(repository, revision)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent and not head.oid.startswith(parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        made = self.storage.add_commit(repository, files, title=header["value"]["summary"], branch=revision)
        url = f"{request.endpoint}/{name}/commit/{made.oid}"
        return Answer(body={"success": True, "commitOid": made.oid, "commitUrl": url})

    def _apply(self, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = self.storage.regular_file(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self.storage.blob(value["oid"]).is_file():
                raise Refusal(400, f"{path}: the LFS object {value['oid']} was never uploaded")
            files[path] = self.storage.lfs_file(value["oid"])
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        else:
            raise Refusal(400, f"not served: {key}")

    def add_tag(self, request: Request, kind: Kind, name: str, revision: str) -> Answer:
        repository = self._repository(request, kind, name)
        self._check_write(request, name)
        tag = request.json()["tag"]
        if tag in repository.tags:
            raise Refusal(409, f"Tag reference exists already: {tag}")
        repository.tags[tag] = self._commit(repository, revision).oid
        self.storage.save(repository)
        return Answer(body={})

    def remove_tag(self, request: Request, kind: Kind, name: str, revision: str) -> Answer:
        repository = self._repository(request, kind, name)
        self._check_write(request, name)
        if repository.tags.pop(revision, None) is None:
            raise Refusal(404, f"no tag {revision}", "RevisionNotFound")
        self.storage.save(repository)
        return Answer(204)

    def file(self, request: Request, datasets: str | None, name: str, revision: str, path: str) -> Answer:
        commit = self._commit(self._repository(request, "dataset" if datasets else "model", name), revision)
        file = commit.files.get(path)
        if file is None:
            raise Refusal(404, f"no file {path} at {revision}", "EntryNotFound")
        etag = f'"{file.sha256 if file.is_lfs else file.oid}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit.oid}
        if file.is_lfs:
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(file.size)}
        return Answer(body=self.storage.blob(file.sha256).read_bytes(), headers=headers)

    def create_collection(self, request: Request) -> Answer:
        wanted = request.json()
        self._check_write(request, wanted["namespace"])
        num_before = len(self.storage.collections)
        private = wanted.get("private", False)
        collection = self.storage.add_collection(wanted["namespace"], wanted["title"], private=private)
        return Answer(200 if len(self.storage.collections) > num_before else 409, _shown(collection))

    def collections(self, request: Request) -> Answer:
        owner = request.query["owner"]
        owned = [_shown(c) for slug, c in self.storage.collections.items() if slug.startswith(f"{owner}/")]
        # The client counts them itself.
        return Answer(body=[{key: value for key, value in c.items() if key != "position"} for c in owned])

    def collection(self, request: Request, slug: str) -> Answer:
        return Answer(body=_shown(self._collection(slug)))

    def add_item(self, request: Request, slug: str) -> Answer:
        collection = self._collection(slug)
        self._check_write(request, slug)
        item = request.json()["item"]
        self._repository(request, item["type"], item["id"])
        if any((there.type, there.id) == (item["type"], item["id"]) for there in collection.items):
            return Answer(409, _shown(collection))
        collection.items.append(CollectionItem(**item, note=request.json().get("note")))
        self.storage.save_collections()
        return Answer(body=_shown(collection))

    def change_item(self, request: Request, slug: str, item: str) -> Answer:
        collection = self._collection(slug)
        self._check_write(request, slug)
        collection.items[int(item)].note = request.json().get("note")
        self.storage.save_collections()
        return Answer(body={"success": True})

    def page(self, request: Request, datasets: str | None = None, name: str | None = None) -> Answer:
        """What there is, as text for people."""
        if name is None:
            pages = [("datasets/" if kind == "dataset" else "") + n for kind, n in self.storage.repositories]
            pages += [f"collections/{slug}" for slug in self.storage.collections]
            return Answer(body="".join(f"{request.endpoint}/{page}\n" for page in pages).encode())
        repository = self._repository(request, "dataset" if datasets else "model", name)
        tags = [f"{tag} {oid}" for tag, oid in repository.tags.items()]
        commits = [f"{commit.oid} {commit.title}" for commit in reversed(repository.commits.values())]
        files = [f"{file.sha256} {file.size:>12,} {path}" for path, file in sorted(repository.head.files.items())]
        lines = [name, "", "commits:", *commits, "", "tags:", *tags, "", "files:", *files, ""]
        return Answer(body="\n".join(lines).encode())

    def collection_page(self, request: Request, slug: str) -> Answer:
        collection = self._collection(slug)
        items = [f"{item.type} {item.id}: {item.note or 'no note'}" for item in collection.items]
        return Answer(body="\n".join([collection.title, "", *items, ""]).encode())

    def _repository(self, request: Request, kind: Kind, name: str) -> Repository:
        repository = self.storage.repositories.get((kind, name))
        if repository is None or (repository.private and request.account is None):
            raise Refusal(404, f"Repository not found: {name}", "RepoNotFound")
        return repository

    def _commit(self, repository: Repository, revision: str | None) -> Commit:
        commit = repository.commit(revision or BRANCH)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _collection(self, slug: str) -> Collection:
        if slug not in self.storage.collections:
            raise Refusal(404, f"no collection {slug}")
        return self.storage.collections[slug]

    def _check_write(self, request: Request, name: str) -> None:
        """Refuse those who may not write in the namespace of `name`."""
        namespace = name.partition("/")[0]
        if request.account is None:
            raise Refusal(401, "Invalid username or password.")
        if not request.account.may_write(namespace):
            raise Refusal(403, f"You don't have the rights to write under the namespace {namespace}")


def _entry(path: str, file: StoredFile) -> dict[str, Any]:
    lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 130}} if file.is_lfs else {}
    return {"type": "file", "path": path, "size": file.size, "oid": file.oid, **lfs}


def _upload_mode(wanted: dict[str, Any], there: StoredFile | None) -> dict[str, Any]:
    mode = "lfs" if is_lfs(wanted["path"], wanted["size"]) else "regular"
    oid = there and (there.sha256 if there.is_lfs else there.oid)
    return {"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _shown(collection: Collection) -> dict[str, Any]:
    items = [
        {"_id": str(i), "id": item.id, "type": item.type, "position": i, "note": item.note and {"text": item.note}}
        for i, item in enumerate(collection.items)
    ]
    namespace = collection.slug.partition("/")[0]
    return {
        **collection.model_dump(include={"slug", "title", "private"}),
        "owner": {"name": namespace, "type": "org"},
        "items": items,
        "lastUpdated": now(),
        "position": 0,
        "theme": "blue",
        "upvotes": 0,
    }


ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", r"/", HubApi.page),
    ("GET", r"/api/whoami-v2", HubApi.whoami),
    ("POST", r"/api/repos/create", HubApi.create),
    ("POST", r"/api/validate-yaml", HubApi.validate_yaml),
    ("GET", rf"{API}(?:/revision/{REVISION})?", HubApi.info),
    ("GET", rf"{API}/refs", HubApi.refs),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<folder>.+))?", HubApi.tree),
    ("POST", rf"{API}/paths-info/{REVISION}", HubApi.paths_info),
    ("POST", rf"{API}/preupload/{REVISION}", HubApi.preupload),
    ("POST", rf"{API}/commit/{REVISION}", HubApi.commit),
    ("POST", rf"{API}/tag/{REVISION}", HubApi.add_tag),
    ("DELETE", rf"{API}/tag/{REVISION}", HubApi.remove_tag),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", HubApi.lfs_batch),
    ("PUT", r"/_lfs/(?P<sha256>[0-9a-f]{64})", HubApi.lfs_put),
    ("GET", r"/api/collections", HubApi.collections),
    ("POST", r"/api/collections", HubApi.create_collection),
    ("GET", rf"/api/collections/{SLUG}", HubApi.collection),
    ("POST", rf"/api/collections/{SLUG}/items", HubApi.add_item),
    ("PATCH", rf"/api/collections/{SLUG}/items/(?P<item>\d+)", HubApi.change_item),
    ("GET", rf"/collections/{SLUG}", HubApi.collection_page),
    ("GET", rf"{FILES}/resolve/{REVISION}/(?P<path>.+)", HubApi.file),
    ("GET", FILES, HubApi.page),
]
