"""What is left on the Hub when publishing goes wrong: every fault, on a real server, with the real client.

    python -m tests.hub_like.faults --out reports/publish

Publishes a first version of a draft, injects one fault while the second is published, and looks at what the server has
on its disk; then publishes again without fault. Fails if the head of `main` is ever anything but a whole version, or
if the second try does not complete the new one with its tag and its place in the collection.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, get_session

from specforge_core.artifacts import write_atomically
from specforge_core.benchmark.tables import markdown_table
from specforge_core.digests import digest, file_sha256, folder_sha256
from specforge_core.environment import environment
from specforge_core.facts import Environment, Record
from specforge_core.hub.client import Hub
from specforge_core.hub.publication import Part, publish_parts
from specforge_core.hub.upload import CHAMPION_TAG, Repository, content_tag
from tests.hub_like import server
from tests.hub_like.injection import FOREVER, Fault
from tests.hub_like.storage import Storage

REPOSITORY = Repository("specbundle/demo-eagle3")
COLLECTION = "SpecBundle"
CLIENT_TIMEOUT_S = 1.0
DELAYS_S = (0.05, 0.05, 0.05)
# More than sockets hold, so that a client is killed while it sends.
NUM_WEIGHT_BYTES = 8 * 2**20
OLD_FILES = {
    "README.md": b"---\nlibrary_name: sglang\n---\n# old\n",
    "config.json": b"{}",
    "base_model/LICENSE": b"gone in the new one",
    "model.safetensors": b"\0" * NUM_WEIGHT_BYTES,
}
NEW_FILES = {
    "README.md": b"---\nlibrary_name: sglang\n---\n# new\n",
    "config.json": b"{}",
    "plots/acceptance.svg": b"<svg/>",
    "model.safetensors": b"\1" * NUM_WEIGHT_BYTES,
}
CHILD = "import sys; from tests.hub_like.faults import publish; publish(*sys.argv[1:])"


class Case(NamedTuple):
    """A fault, by what a reader knows it by."""

    name: str
    make: Callable[[], Fault]
    """One that strikes once."""
    lasts: bool = False
    """Every time, until the client gives up."""
    kills: bool = False
    """The client's process gets SIGKILL when the fault strikes."""
    may_leave_old: bool = True
    """False if the commit has happened by then."""
    delays_s: tuple[float, ...] = DELAYS_S


COMMIT, UPLOAD, TAG = "POST .*/commit/", "PUT /_lfs/", "POST .*/tag/"
READ_BACK, LIST, PREPARE = "GET .*/resolve/", "(POST|PATCH) /api/collections", "POST .*/preupload/"
LATE = {"may_leave_old": False}


def _cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _cases() -> Iterator[Case]:
    silence = partial(Fault, silence_s=3 * CLIENT_TIMEOUT_S)
    for lasts in (False, True):
        yield Case("no answer to the commit (timeout)", partial(silence, COMMIT), lasts)
        yield Case("commit refused as outdated (412)", partial(Fault, COMMIT, status=412), lasts)
        yield Case("commit answered by 500", partial(Fault, COMMIT, status=500), lasts)
        yield Case("commit request truncated", partial(Fault, COMMIT, body_fraction=0.5), lasts)
        yield Case("tag answered by 500", partial(Fault, TAG, status=500), lasts, **LATE)
        yield Case("collection answered by 500", partial(Fault, LIST, status=500), lasts, **LATE)
        yield Case("read back answered by 500", partial(Fault, READ_BACK, status=500), lasts, **LATE)
        yield Case("read back truncated", partial(Fault, READ_BACK, change=_cut_short), lasts)
        # The client itself tries these again for half a minute.
        few = {"delays_s": ()} if lasts else {}
        yield Case("weights truncated", partial(Fault, UPLOAD, body_fraction=0.5), lasts, **few)
        yield Case("weights answered by 500", partial(Fault, UPLOAD, status=500), lasts, **few)
        yield Case("preparation answered by 500", partial(Fault, PREPARE, status=500), lasts, **few)
    # These happen after the commit is made; only its answer is lost.
    yield Case("commit made, its answer lost (timeout)", partial(silence, COMMIT, when="after"), **LATE)
    yield Case("commit made, answered by 500", partial(Fault, COMMIT, when="after", status=500), **LATE)
    kills = {"kills": True}
    yield Case("kill -9 during the upload of the weights", partial(Fault, UPLOAD, body_fraction=0.5), **kills)
    yield Case("kill -9 before the commit", partial(Fault, COMMIT), **kills)
    yield Case("kill -9 after the commit", partial(Fault, COMMIT, when="after"), **kills, **LATE)
    yield Case("kill -9 while reading back", partial(Fault, READ_BACK), **kills, **LATE)
    yield Case("kill -9 before the tag", partial(Fault, TAG), **kills, **LATE)
    yield Case("kill -9 after the tag", partial(Fault, TAG, when="after"), **kills, **LATE)
    yield Case("kill -9 before the collection", partial(Fault, LIST), **kills, **LATE)


CASES = tuple(_cases())


class HubState(Record):
    """What the server has on its disk."""

    head: str
    """`old`, `new`, or `neither`, which must never be."""
    tagged: bool
    """The new version has its tag and the champion's, both on the head."""
    listed: bool
    """The collection's note is of the new version."""
    num_commits: int
    """Besides the one of the making of the repository."""


class FaultRun(Record):
    """One case, and the publishing after it."""

    fault: str
    lasts: bool
    outcome: str
    """Of the publishing that met the fault: `published`, `killed`, or the error's message."""
    num_hits: int
    left: HubState
    again: HubState
    """After publishing once more, without fault."""


class FaultsResult(Record):
    """All cases."""

    runs: tuple[FaultRun, ...]
    environment: Environment


def publish(endpoint: str, folder: str, note: str, *delays_s: str) -> None:
    """What a build does with a folder; also in a process that is killed."""
    constants.HF_HUB_DISABLE_XET = True
    hub = Hub(endpoint, os.environ.get("HF_TOKEN", server.TOKEN), delays_s=tuple(map(float, delays_s)))
    publish_parts(hub, [Part(REPOSITORY, Path(folder), note)], COLLECTION)


def run_case(case: Case, root: Path) -> FaultRun:
    """The case in a folder of its own. Raises: AssertionError for a promise that is not kept."""
    old, new = _folder(root / "old", OLD_FILES), _folder(root / "new", NEW_FILES)
    with server.running(root / "hub") as hub_server, _impatient_client():
        publish(hub_server.url, str(old), "old")
        fault = hub_server.faults.add(case.make())
        if case.lasts:
            fault.times = FOREVER
        hub_server.calls.clear()
        arguments = (hub_server.url, str(new), "new", *map(str, case.delays_s))
        outcome = _killed(fault, *arguments) if case.kills else _outcome(*arguments)
        left = _state(root)
        hub_server.faults.clear()
        publish(hub_server.url, str(new), "new")
        again = _state(root)
    assert fault.num_hits, f"{case.name} was never met"
    assert left.head == "new" or (left.head == "old" and case.may_leave_old), f"{case.name} left {left}"
    assert (again.head, again.tagged, again.listed) == ("new", True, True), f"after {case.name}: {again}"
    # Of each version one: what was sent once is not sent again.
    assert hub_server.api.num_uploads == 2, f"{case.name}: {hub_server.api.num_uploads} uploads of weights"
    return FaultRun(
        fault=case.name,
        lasts=case.lasts,
        outcome=outcome,
        num_hits=fault.num_hits,
        left=left,
        again=again,
    )


def _outcome(*arguments: str) -> str:
    try:
        publish(*arguments)
    except (ConnectionError, RuntimeError, ValueError) as error:
        return re.sub(r"127\.0\.0\.1:\d+|\b[0-9a-f]{40}\b", "...", str(error))
    return "published"


def _killed(fault: Fault, *arguments: str) -> str:
    """Publishes in a process that is killed when the fault strikes."""
    environ = {**os.environ, "HF_TOKEN": server.TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], env=environ, stderr=subprocess.DEVNULL)

    def kill() -> None:
        child.kill()
        child.wait()

    fault.on_hit = kill
    assert child.wait(timeout=120) == -signal.SIGKILL
    return "killed"


@contextlib.contextmanager
def _impatient_client() -> Iterator[None]:
    """Silence of the server is over sooner than in earnest."""
    session = get_session()
    patience = session.timeout
    session.timeout = CLIENT_TIMEOUT_S
    try:
        yield
    finally:
        session.timeout = patience


def _folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _state(root: Path) -> HubState:
    """Read from the disk, not from the server's memory."""
    storage = Storage(root / "hub")
    repository = storage.repositories[REPOSITORY.kind, REPOSITORY.name]
    head = {
        name: file_sha256(storage.blob(file.sha256))
        for name, file in repository.head.files.items()
        if name != ".gitattributes"
    }
    versions = {"old": folder_sha256(root / "old"), "new": folder_sha256(root / "new")}
    names = [name for name, files in versions.items() if files == head]
    tags = (content_tag(digest(versions["new"])), CHAMPION_TAG)
    notes = [item.note for collection in storage.collections.values() for item in collection.items]
    return HubState(
        head=names[0] if names else "neither",
        tagged=all(repository.tags.get(tag) == repository.head.oid for tag in tags) and names == ["new"],
        listed=notes == ["new"],
        num_commits=len(repository.commits) - 1,
    )


def markdown(result: FaultsResult) -> str:
    """The result for people."""
    rows = [
        {
            "fault": run.fault + (", every time" if run.lasts else ""),
            "publishing": run.outcome.replace("|", "/"),
            "head of `main` then": run.left.head,
            "tagged": "yes" if run.left.tagged else "no",
            "listed": "yes" if run.left.listed else "no",
            "published again": f"{run.again.head}, tagged, listed",
            "commits": str(run.again.num_commits),
        }
        for run in result.runs
    ]
    made_on = result.environment
    versions = ", ".join(f"{name} {version}" for name, version in made_on.versions.items())
    num_left = {head: sum(run.left.head == head for run in result.runs) for head in ("old", "new")}
    return (
        "# What is left on the Hub when publishing goes wrong\n\n"
        f"{len(result.runs)} faults while the second version of a draft is published, with the real client, on a local "
        "server that keeps everything on disk (`tests/hub_like`). Each left a whole version: the old one "
        f"{num_left['old']} times, the new one {num_left['new']} times. Publishing again completed each: the new one "
        "at the head, its tag and the champion's on it, its note in the collection, its weights sent once.\n\n"
        f"{markdown_table(rows)}\n\n"
        "A version is whole if the files of the commit are exactly those of its folder, by the sha256 of what lies on "
        "the server's disk. Commits: one of each version; where the new one read back wrong, one more that put the old "
        "one back, and one that published again.\n\n"
        f"{versions}; commit {made_on.commit}.\n\n```\n{made_on.command}\n```\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_like.faults", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of faults.json and faults.md")
    args = parser.parse_args()
    runs = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run_case(case, Path(folder)))
    result = FaultsResult(
        runs=tuple(runs), environment=environment(num_threads=1, gpu=None, more_versions=("huggingface_hub",))
    )
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "faults.json", result.model_dump_json(indent=1) + "\n")
    write_atomically(args.out / "faults.md", markdown(result))
    print(markdown(result))  # noqa: T201


if __name__ == "__main__":
    main()
