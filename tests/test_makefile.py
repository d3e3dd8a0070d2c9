"""What `make` refuses before it spends anything."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_8b_bundle_asks_for_a_gpu_before_it_installs_or_writes_anything(tmp_path: Path) -> None:
    # A host with the driver's program and no GPU: what a host with neither prints is no more.
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho No devices found\n", encoding="utf-8")
    program.chmod(0o755)
    variables = [f"VENV={tmp_path}/venv", f"INFLATED={tmp_path}/target", "PYTHON=false"]
    # Not as a part of the `make test` that this may run in.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    made = subprocess.run(["make", "bundle-8b", *variables], cwd=ROOT, env=env, capture_output=True, text=True)
    assert made.returncode == 2
    assert "bundle-8b needs a GPU, and nvidia-smi lists none" in made.stderr
    assert made.stdout == ""
    assert list(tmp_path.iterdir()) == [program]
