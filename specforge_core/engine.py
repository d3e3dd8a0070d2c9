"""Where SGLang is on this host: two environment variables, which say nothing about what a build makes. Torch-free."""

import contextlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping

from specforge_core.manifest_sections import EngineConfig
from specforge_core.stages import ServedEngine

PYTHON_VARIABLE = "SPECBUNDLE_SGLANG_PYTHON"
"""Interpreter of the environment that has SGLang; this process's own where it is not set."""
URLS_VARIABLE = "SPECBUNDLE_SGLANG_URLS"
"""Servers that run already, `http://host:port`, separated by commas."""
VERSION_TIMEOUT_S = 60.0


def engine_on_host(config: EngineConfig, environ: Mapping[str, str]) -> ServedEngine:
    """An entry's engine, with what the environment says about this host."""
    urls = tuple(url.strip() for url in environ.get(URLS_VARIABLE, "").split(",") if url.strip())
    return ServedEngine(**dict(config), python=sglang_python(environ), urls=urls)


def sglang_python(environ: Mapping[str, str]) -> str:
    """The interpreter that SGLang's servers are started with."""
    return environ.get(PYTHON_VARIABLE) or sys.executable


def engine_version(engine: ServedEngine) -> str | None:
    """Name and version of what an engine decodes with on this host; None if it has no SGLang."""
    if engine.name == "transformers":
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    # A plan can be made anywhere. What runs stages asks for the version before the first of them.
    with contextlib.suppress(ValueError):
        return f"sglang {sglang_version(engine.python)}"
    return None


def sglang_version(python: str) -> str:
    """The version of SGLang that an interpreter has, without importing it, which takes 40 s.

    Raises: ValueError if it has none or cannot be run.
    """
    program = "import importlib.metadata; print(importlib.metadata.version('sglang'))"
    try:
        asked = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    else:
        if asked.returncode == 0:
            return asked.stdout.strip()
        reason = (asked.stderr.strip().splitlines() or [f"status {asked.returncode}"])[-1]
    raise ValueError(
        f"{python} has no SGLang ({reason}); set {PYTHON_VARIABLE} to the interpreter of an environment that has it, "
        "or engine.name: transformers"
    )
