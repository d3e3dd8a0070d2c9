"""Pins what a manifest names: a path becomes its content's digest, a branch on the Hub its commit. Torch-free.

A name is a path if it exists under the manifest's folder, starts with ".", "/" or "~", or ends like a data file;
otherwise it is a Hub id, `organization/name`.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from specforge_core.artifacts import write_atomically
from specforge_core.demo import corpus
from specforge_core.digests import digest, file_sha256, files_sha256
from specforge_core.manifest import Manifest
from specforge_core.manifest_sections import (
    BUILTIN_DEMO,
    REPOSITORY_PATTERN,
    BenchmarkConfig,
    DataConfig,
    PromptSource,
    TargetConfig,
)
from specforge_core.manifest_yaml import Node, compose
from specforge_core.stages import ResolvedBenchmark, ResolvedData, ResolvedSource, ResolvedSuite, ResolvedTarget

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

RepoKind = Literal["model", "dataset"]

COMMIT = re.compile(r"[0-9a-f]{40}")
DEFAULT_BRANCH = "main"
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
# What `transformers` and a server read of a model folder, remote code included. A README changes no result.
MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py"),
    *("tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template*", "additional_chat_templates/*"),
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# From this size on, the sha256 of an unchanged file is remembered: a target of 140 GB takes minutes to read.
LARGE_FILE_BYTES = 64 * 2**20


def resolve_target(
    config: TargetConfig, base_dir: Path, *, hash_cache: Path | None = None, api: "HfApi | None" = None
) -> ResolvedTarget:
    """The target with its content pinned.

    Args: base_dir: the manifest's folder; hash_cache: folder that remembers digests of large files; api: Hub client.
    Raises: ValueError if there is no such target or it holds no safetensors, ConnectionError if the Hub is needed to
    resolve a branch and cannot be reached.
    """
    path = local_path(config.model, base_dir)
    if path is None:
        commit = _commit("model", config.model, config.revision, base_dir, api)
        return ResolvedTarget(**{**dict(config), "revision": commit, "content_id": commit})
    _refuse_revision(config.model, config.revision)
    _check_model_folder(path)
    files = sorted({file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    hashes = dict(zip(files, _remembered_sha256(files, hash_cache), strict=True))
    content_id = digest({file.relative_to(path).as_posix(): sha256 for file, sha256 in hashes.items()})
    return ResolvedTarget(**{**dict(config), "model": str(path), "content_id": content_id})


def resolve_source(source: PromptSource, base_dir: Path, *, api: "HfApi | None" = None) -> ResolvedSource:
    """The prompt source with its content pinned. Args and errors as of `resolve_target`."""
    if source.dataset == BUILTIN_DEMO:
        return ResolvedSource(**{**dict(source), "content_id": _demo_content_id(source)})
    path = local_path(source.dataset, base_dir)
    if path is None:
        commit = _commit("dataset", source.dataset, source.revision, base_dir, api)
        return ResolvedSource(**{**dict(source), "revision": commit, "content_id": commit})
    _refuse_revision(source.dataset, source.revision)
    if not path.is_file():
        raise ValueError(f'prompt source "{source.dataset}": {path} is no file; name a file in {DATA_SUFFIXES}')
    (content_id,) = files_sha256([path], desc=f"reading {path.name}")
    return ResolvedSource(**{**dict(source), "dataset": str(path), "content_id": content_id})


def resolve_data(config: DataConfig, base_dir: Path, *, api: "HfApi | None" = None) -> ResolvedData:
    """The data with the content of every source pinned."""
    sources = tuple(resolve_source(source, base_dir, api=api) for source in config.sources)
    return ResolvedData(**{**dict(config), "sources": sources})


def resolve_benchmark(config: BenchmarkConfig, base_dir: Path, *, api: "HfApi | None" = None) -> ResolvedBenchmark:
    """The benchmark with the content of every suite pinned."""
    suites = tuple(
        ResolvedSuite(**{**dict(suite), "source": resolve_source(suite.source, base_dir, api=api)})
        for suite in config.suites
    )
    return ResolvedBenchmark(**{**dict(config), "suites": suites})


def pin(path: Path, *, api: "HfApi | None" = None) -> list[str]:
    """One line about each Hub revision in a manifest that was a branch; the file now names its commit instead.

    Comments and formatting stay. Raises: ManifestError, ValueError and ConnectionError before anything is written.
    """
    base_dir = Manifest.load(path).base_dir
    text = path.read_bytes().decode("utf-8")
    root = compose(text).root
    assert root is not None
    commits: dict[tuple[RepoKind, str, str], str] = {}
    edits, changes = [], []
    for reference in _references(root):
        name, branch = reference.name.value, (reference.revision and reference.revision.value) or DEFAULT_BRANCH
        if name == BUILTIN_DEMO or COMMIT.fullmatch(branch) or local_path(name, base_dir):
            continue
        repo = (reference.kind, name, branch)
        if repo not in commits:
            commits[repo] = _branch_commit(*repo, base_dir, api)
        edits.append(_edit(text, reference, commits[repo]))
        changes.append(f"line {reference.name.line}: {name}: {branch} is now {commits[repo]}")
    for edit in sorted(edits, reverse=True):
        # From the end on, so that the offsets before it stay true.
        text = text[: edit.start] + edit.text + text[edit.end :]
    if edits:
        write_atomically(path.resolve(), text)
    return changes


def local_path(name: str, base_dir: Path) -> Path | None:
    """Where a name of the manifest lies; None for one that is a Hub id."""
    path = base_dir / Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.endswith(DATA_SUFFIXES)
    return path.resolve() if looks_local or path.exists() else None


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f'"{name}" is a path and has no revision "{revision}"; remove it')


def _check_model_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ValueError(
            f"target {path} is no model folder: it has no config.json; name a folder that has, or a Hub id"
        )
    _check_safetensors(str(path), [file.name for file in path.iterdir()])


def _check_safetensors(where: str, names: Sequence[str]) -> None:
    """Raises: ValueError if none of these files, of a target, is a safetensors file."""
    if any(name.endswith(".safetensors") for name in names):
        return
    pickled = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    found = (
        f"only pickled weights, which run code when they are read ({', '.join(pickled)})" if pickled else "no weights"
    )
    raise ValueError(f"target {where} holds {found}; save it as safetensors with `save_pretrained` and name that copy")


def _remembered_sha256(files: Sequence[Path], hash_cache: Path | None) -> list[str]:
    if hash_cache is None:
        return files_sha256(files, desc="reading the target")
    memos: dict[Path, Path] = {}
    for file in files:
        stat = file.stat()
        if stat.st_size >= LARGE_FILE_BYTES:
            memos[file] = hash_cache / digest([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    if memos:
        hash_cache.mkdir(parents=True, exist_ok=True)
    known = {file: memo.read_text(encoding="ascii") for file, memo in memos.items() if memo.is_file()}
    unknown = [file for file in files if file not in known]
    known.update(zip(unknown, files_sha256(unknown, desc="reading the target"), strict=True))
    for file in memos.keys() & set(unknown):
        write_atomically(memos[file], known[file])
    return [known[file] for file in files]


def _demo_content_id(source: PromptSource) -> str:
    _refuse_revision(source.dataset, source.revision)
    if source.config is not None and source.config not in corpus.FAMILIES:
        raise ValueError(f'{BUILTIN_DEMO} has no config "{source.config}"; it has {", ".join(corpus.FAMILIES)}')
    if source.split not in get_args(corpus.Split):
        raise ValueError(f'{BUILTIN_DEMO} has no split "{source.split}"; it has {", ".join(get_args(corpus.Split))}')
    # It is made by a program: its content is that program, and its seed belongs to who reads it.
    files = sorted(file for file in Path(corpus.__file__).parent.glob("*.py") if file.name != "__main__.py")
    return digest({file.name: file_sha256(file) for file in files})


def _commit(kind: RepoKind, name: str, revision: str | None, base_dir: Path, api: "HfApi | None") -> str:
    _check_hub_id(name, base_dir)
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    branch = revision or DEFAULT_BRANCH
    commit = _branch_commit(kind, name, branch, base_dir, api)
    logger.warning(
        "%s %s: branch %s is commit %s in this build; `specbundle pin` writes it into the manifest",
        kind,
        name,
        branch,
        commit,
    )
    return commit


def _check_hub_id(name: str, base_dir: Path) -> str:
    """Why it is not a path, for messages. Raises: ValueError if it is no Hub id either."""
    neither = f'"{name}" is no path ({base_dir / name} does not exist)'
    if not re.fullmatch(REPOSITORY_PATTERN, name):
        raise ValueError(f"{neither} and no Hub id (organization/name)")
    return neither


def _branch_commit(kind: RepoKind, name: str, branch: str, base_dir: Path, api: "HfApi | None") -> str:
    neither = _check_hub_id(name, base_dir)
    # Importing it takes a second, and a build of local files needs none.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = (api or HfApi()).repo_info(name, repo_type=kind, revision=branch)
    except RevisionNotFoundError:
        raise ValueError(f'{kind} {name} on the Hub has no revision "{branch}"; name a branch or a commit') from None
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{neither}, and the Hub shows no {kind} of that name; if it is private or gated, set HF_TOKEN"
        ) from error
    except (HTTPError, OSError) as error:
        raise ConnectionError(
            f'{neither}, and the Hub cannot be asked what "{branch}" of {kind} {name} is: {error}; '
            "a revision that is a commit needs no network"
        ) from error
    if info.sha is None:
        raise ConnectionError(f'the Hub names no commit for "{branch}" of {kind} {name}; try again')
    files = [sibling.rfilename for sibling in getattr(info, "siblings", None) or ()]
    if kind == "model" and files:
        _check_safetensors(f"{name} on the Hub", files)
    return info.sha


class _Reference(NamedTuple):
    """Where a manifest names something that may be on the Hub."""

    kind: RepoKind
    name: Node
    revision: Node | None


def _references(root: Node) -> Iterator[_Reference]:
    defaults = root.child("defaults")
    for section in (*([defaults] if defaults else []), *root.deepest(("entries",)).children()):
        sources = section.deepest(("data", "sources")).children()
        suites = section.deepest(("benchmark", "suites")).children()
        suite_sources = [source for suite in suites if (source := suite.child("source"))]
        if (target := section.child("target")) and (name := target.child("model")):
            yield _Reference("model", name, target.child("revision"))
        for source in (*sources, *suite_sources):
            if name := source.child("dataset"):
                yield _Reference("dataset", name, source.child("revision"))


class _Edit(NamedTuple):
    start: int
    end: int
    text: str


def _edit(text: str, reference: _Reference, commit: str) -> _Edit:
    # Quoted: some commits look like numbers.
    quoted = f'"{commit}"'
    name, revision = reference.name, reference.revision
    if revision is not None:
        is_empty = revision.start == revision.end
        return _Edit(revision.start, revision.end, f" {quoted}" if is_empty else quoted)
    if name.in_braces:
        return _Edit(name.end, name.end, f", revision: {quoted}")
    line_end = re.compile(r"\r?\n|\Z").search(text, name.end)
    assert line_end is not None
    newline = "\r\n" if "\r\n" in text else "\n"
    return _Edit(line_end.start(), line_end.start(), f"{newline}{' ' * name.column}revision: {quoted}")
