"""Where a host has SGLang: an interpreter and servers that the environment names."""

import sys
from importlib import metadata
from pathlib import Path

import pytest
import transformers

from specforge_core.engine import engine_on_host, engine_version, sglang_python, sglang_version
from specforge_core.manifest_sections import EngineConfig
from specforge_core.stages import ServedEngine


def make_interpreter(path: Path, script: str) -> str:
    """A program that takes the place of Python in another environment."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_environment_adds_interpreter_and_servers_to_what_the_manifest_says() -> None:
    config = EngineConfig(tensor_parallel=2, max_running_requests=16)
    environ = {
        "SPECBUNDLE_SGLANG_PYTHON": "/opt/sglang/bin/python",
        "SPECBUNDLE_SGLANG_URLS": "http://a:30000, http://b:30000,",
    }
    engine = engine_on_host(config, environ)
    assert (engine.name, engine.tensor_parallel, engine.max_running_requests) == ("sglang", 2, 16)
    assert (engine.python, engine.urls) == ("/opt/sglang/bin/python", ("http://a:30000", "http://b:30000"))


@pytest.mark.parametrize("environ", [{}, {"SPECBUNDLE_SGLANG_PYTHON": "", "SPECBUNDLE_SGLANG_URLS": ""}])
def test_without_variables_it_is_this_interpreter_and_no_server(environ: dict[str, str]) -> None:
    engine = engine_on_host(EngineConfig(), environ)
    assert (engine.python, engine.urls) == (sys.executable, ())
    assert sglang_python(environ) == sys.executable


def test_the_version_is_that_of_the_other_environment(tmp_path: Path) -> None:
    # An environment is known by the metadata of its packages.
    metadata_file = tmp_path / "site/sglang-0.5.14.dist-info/METADATA"
    metadata_file.parent.mkdir(parents=True)
    metadata_file.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.14\n")
    script = f'PYTHONPATH={tmp_path}/site exec {sys.executable} "$@"'
    assert sglang_version(make_interpreter(tmp_path / "python", script)) == "0.5.14"


def test_the_version_of_an_engine_names_what_decodes(tmp_path: Path) -> None:
    python = make_interpreter(tmp_path / "python", "echo 0.5.14")
    served = ServedEngine(name="sglang", python=python)
    assert engine_version(served) == "sglang 0.5.14"
    assert engine_version(served.model_copy(update={"python": str(tmp_path / "gone")})) is None
    in_process = engine_version(ServedEngine(name="transformers"))
    assert in_process == f"transformers {transformers.__version__}, torch {metadata.version('torch')}"


def test_an_interpreter_without_sglang_is_refused_with_the_way_out(tmp_path: Path) -> None:
    python = make_interpreter(tmp_path / "python", f'exec {sys.executable} -S "$@"')
    with pytest.raises(
        ValueError, match=r"python has no SGLang \(.*PackageNotFoundError.*\); set SPECBUNDLE_SGLANG_PY"
    ):
        sglang_version(python)
    with pytest.raises(ValueError, match=r"gone has no SGLang \(.*No such file.*\); set SPECBUNDLE_SGLANG_PYTHON to"):
        sglang_version(str(tmp_path / "gone"))
    silent = make_interpreter(tmp_path / "silent", "exit 3")
    with pytest.raises(ValueError, match=r"has no SGLang \(status 3\)"):
        sglang_version(silent)
