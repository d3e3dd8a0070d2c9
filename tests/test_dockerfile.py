"""The Dockerfile, as far as that can be checked where nothing can be built: a linter, and what it names."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dockerfile() -> str:
    """Its instructions, without comments, one a line."""
    text = (ROOT / "Dockerfile").read_text()
    return re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))


def instructions(dockerfile: str, name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in dockerfile.splitlines() if line.startswith(f"{name} ")]


def goes_to_the_daemon(path: str) -> bool:
    """Whether .dockerignore lets a path in: the last pattern that matches it or a folder above decides."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    candidates = [path, *(parent.as_posix() for parent in Path(path).parents)]
    is_in = True
    for line in lines:
        pattern = line.removeprefix("!").removeprefix("**/")
        if any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(Path(name).name, pattern) for name in candidates):
            is_in = line.startswith("!")
    return is_in


def test_a_linter_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists() and not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed")
    command = [str(hadolint) if hadolint.exists() else "hadolint", str(ROOT / "Dockerfile")]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_base_is_pinned_and_has_the_cuda_of_the_constraints(dockerfile: str) -> None:
    (base,) = instructions(dockerfile, "FROM")
    found = re.fullmatch(r"nvidia/cuda:(\d+)\.\d+\.\d+-devel-ubuntu24\.04", base)
    assert found, base
    assert f"CUDA {found[1]}" in (ROOT / "constraints/gpu.txt").read_text()
    assert "latest" not in dockerfile


def test_everything_that_is_copied_exists_and_is_sent(dockerfile: str) -> None:
    sources = [source for line in instructions(dockerfile, "COPY") for source in line.split()[:-1]]
    assert {"flows", "tasks", "specforge_core", "constraints/gpu.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert goes_to_the_daemon(source), source


@pytest.mark.parametrize(
    "path", [".env", ".git/config", ".specbundle/mlflow.db", "reports/LOG.md", "flows/__pycache__"]
)
def test_nothing_else_is_sent(path: str) -> None:
    assert not goes_to_the_daemon(path)


def test_versions_are_those_of_the_documents(dockerfile: str) -> None:
    (argument,) = instructions(dockerfile, "ARG")
    assert f"sglang=={argument.removeprefix('SGLANG_VERSION=')}" in (ROOT / "README.md").read_text()
    installs = [line for line in instructions(dockerfile, "RUN") if "pip install" in line]
    (project,) = [line for line in installs if "--constraint" in line]
    assert "--constraint constraints/gpu.txt" in project
    assert "'.[gpu,s3]'" in project


def test_sglang_is_where_the_environment_says_and_apart_from_the_project(dockerfile: str) -> None:
    python = re.search(r"SPECBUNDLE_SGLANG_PYTHON=(\S+)", dockerfile)
    assert python
    (sglang,) = [line for line in instructions(dockerfile, "RUN") if "sglang==" in line]
    assert f"python3 -m venv {Path(python[1]).parents[1]}" in sglang
    path = re.search(r"PATH=([^:\s]+):\$PATH", dockerfile)
    assert path
    assert Path(path[1]) != Path(python[1]).parent


def test_it_runs_as_nobody_in_particular_and_holds_no_secret(dockerfile: str) -> None:
    assert int(instructions(dockerfile, "USER")[-1]) > 0
    # As the last word on it: nothing is installed or copied after it by that user.
    assert dockerfile.index("\nUSER ") > dockerfile.rindex("\nRUN ")
    assert not re.search(r"token|secret|password|credential|_key", dockerfile, flags=re.IGNORECASE)


@pytest.mark.slow
def test_the_projects_requirements_can_be_installed_before_its_code_is_there(dockerfile: str, tmp_path: Path) -> None:
    """Of the cached layer: what pip makes of the few files that are copied first."""
    first = next(line for line in instructions(dockerfile, "COPY") if "pyproject.toml" in line)
    for source in first.split()[:-1]:
        shutil.copy(ROOT / source, tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "wheels", "."]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (wheel,) = (tmp_path / "wheels").glob("specbundle-*.whl")
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    (metadata,) = (tmp_path / "unpacked").glob("*.dist-info/METADATA")
    assert "Requires-Dist: prefect" in metadata.read_text()
    assert not [path for path in (tmp_path / "unpacked").iterdir() if not path.name.endswith(".dist-info")]
