"""One direction: flows -> tasks -> specforge_core. Only the core, in a stage's own process, imports torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "specforge_core": {"prefect", "mlflow", "flows", "tasks"},
    "tasks": {"flows", "torch", "transformers"},
    "flows": {"torch", "transformers"},
}
# The command line is thin and lies over the flows.
ALLOWED = {"specforge_core/cli.py": {"flows", "tasks"}}
TORCH_FREE_CORE = (
    "artifacts benchmark.server cli engine gpus launch manifest mirror plan process resolve scratch stages "
    "supervise".split()
)


def imported_packages(file: Path) -> Iterator[str]:
    """Top-level packages that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield "." * node.level + node.module.partition(".")[0]


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_no_layer_imports_from_above(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        found = set(imported_packages(file)) & (FORBIDDEN[package] - ALLOWED.get(name, set()))
        assert not found, f"{name} imports {found}"


def test_the_orchestrator_and_the_torch_free_core_bring_no_torch() -> None:
    files = [file for package in ("flows", "tasks") for file in sorted((ROOT / package).glob("[!_]*.py"))]
    modules = [f"{file.parent.name}.{file.stem}" for file in files] + [
        f"specforge_core.{name}" for name in TORCH_FREE_CORE
    ]
    program = f"import {', '.join(modules)}, sys; print(*({{'torch', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
