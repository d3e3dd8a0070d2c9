"""The flow `specbundle`, deployed by a test, with stages that write down on which device and when they ran.

RECORDING names the file that gets a JSON line for each stage. RECORDING_DEVICE is where its stages really compute, if
the devices that they lease are made up.
"""

import os
import sys
from pathlib import Path

from flows.specbundle import specbundle
from specforge_core.stages import StageSpec
from tasks import stage as stage_module

__all__ = ["specbundle"]

RECORDER = """
import json, os, subprocess, sys, time
journal, stage, key, *command = sys.argv[1:]
# The clock is the same for all processes of a host.
started_at = time.monotonic()
status = subprocess.run(command).returncode
devices = [device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device]
record = {"stage": stage, "key": key, "pid": os.getpid(), "devices": devices,
          "started_at": started_at, "stopped_at": time.monotonic()}
with open(journal, "a") as file:
    file.write(json.dumps(record) + "\\n")
sys.exit(status)
"""
stage_command = stage_module.stage_command


def recorded_command(spec: StageSpec, spec_path: Path, out: Path) -> list[str]:
    """In the place of `stage_command`: the same, under a recorder. The device is no part of a stage's key."""
    if device := os.environ.get("RECORDING_DEVICE"):
        spec_path.write_text(spec.model_copy(update={"device": device}).model_dump_json())
    command = stage_command(spec, spec_path, out)
    return [sys.executable, "-c", RECORDER, os.environ["RECORDING"], spec.stage, spec.key(), *command]


stage_module.stage_command = recorded_command
