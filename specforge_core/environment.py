"""What a measurement runs on, for its record. Torch-free."""

import contextlib
import importlib.metadata
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from specforge_core import __version__
from specforge_core.facts import Environment
from specforge_core.gpus import cpu_name

VERSIONS_OF = ("torch", "transformers")


def environment(
    *, num_threads: int, gpu: str | None, more_versions: Sequence[str] = (), named_commit: str | None = None
) -> Environment:
    """What this process runs on.

    Args: gpu: name of the GPU that it computes on; more_versions: packages that count beside the usual ones;
    named_commit: what the user says that these sources are, where they lie outside a checkout.
    """
    return Environment(
        cpu=cpu_name(),
        num_threads=num_threads,
        gpu=gpu,
        # A measurement may run from sources that are not installed.
        versions={"specbundle": __version__}
        | {name: importlib.metadata.version(name) for name in (*VERSIONS_OF, *more_versions)},
        commit=named_commit or commit(),
        command=shlex.join(["python", *sys.orig_argv[1:]]),
    )


def commit() -> str | None:
    """The commit of this project, `-dirty` if files differ from it; None outside a checkout of it, or without git."""
    source = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        # An installed copy may lie inside a checkout of something else.
        git("ls-files", "--error-unmatch", source.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return None


def hardware_stem(made_on: Environment) -> str:
    """The name of the hardware that a result was made on, fit for a file."""
    return re.sub(r"[^a-z0-9]+", "-", (made_on.gpu or made_on.cpu).lower()).strip("-")
