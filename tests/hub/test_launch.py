"""The commands of a card do what they say when they are pasted: programs stand in for the servers', a shell reads them.

The folder and the target's path have blanks, so that quoting counts.
"""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specforge_core.artifacts import seal
from specforge_core.benchmark.report import make_report
from specforge_core.benchmark.server import free_port
from specforge_core.export.run import main as export
from specforge_core.facts import BenchmarkResult
from specforge_core.hub.repository import publish_directory, repository_files
from specforge_core.manifest_publish import PublishConfig
from specforge_core.manifest_sections import Eagle3Config, TargetConfig
from specforge_core.stages import ExportSpec
from tests import made_build, tiny
from tests.export.folders import write_checkpoint
from tests.made_build import measurement, result, served_result
from tests.sglang_like import MODULE, Behaviour

REPO_ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0
# As `hf` and `vllm`: leaves what it was called with.
RECORDER = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
"""
# As `python3`, which is asked for SGLang's module.
SERVER = """#!/bin/sh
test "$1 $2" = "-m sglang.launch_server" || exit 9
shift 2
exec {python} -m {module} --port {port} "$@"
"""


def published(root: Path, benchmark: BenchmarkResult, **changes: Any) -> Path:
    """The folder of a build whose draft is real, and whose figures are made up; its target lies on this disk."""
    target = tiny.resolved(tiny.make_target(root / "my target"))
    checkpoint = write_checkpoint(root / "checkpoint", target, Eagle3Config(num_steps=3))
    facts = export(ExportSpec(target=target, checkpoint=checkpoint, num_steps=3), root / "draft")
    draft = seal(root / "draft", facts, stage="export", key="key-export", inputs={}, elapsed_s=1.0)
    artifacts = made_build.artifacts(root / "store", benchmark)._replace(draft=draft)
    values: dict[str, Any] = {"target": TargetConfig(model="my target"), "publish": PublishConfig(repository=None)}
    report = make_report(made_build.entry(**(values | changes)), target, artifacts, failures=())
    return publish_directory(root / "my drafts", "demo", repository_files(report, artifacts, target)).path


def commands(folder: Path, section: str) -> list[str]:
    """What there is to be pasted in a section of the folder's card."""
    text = re.split(r"\n##+ ", (folder / "README.md").read_text().split(f"\n{section}\n")[1])[0]
    return re.findall(r"```bash\n(.*?)\n```", text, flags=re.DOTALL)


def install(directory: Path, name: str, text: str) -> None:
    """A program of this name."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@contextlib.contextmanager
def pasted(command: str, programs: Path, folder: Path, behaviour: Behaviour) -> Iterator[str]:
    """The address of the server that a pasted command starts, in a shell that stands in `folder`."""
    port = free_port()
    install(programs, "python3", SERVER.format(python=sys.executable, module=MODULE, port=port))
    environment = dict(
        os.environ, PATH=f"{programs}:{os.environ['PATH']}", PYTHONPATH=str(REPO_ROOT), OMP_NUM_THREADS="1"
    )
    environment |= dict([behaviour.variable()])
    shell = subprocess.Popen(["bash", "-c", command], cwd=folder, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_ready(url):
            assert shell.poll() is None, f"`{command}` ended with status {shell.returncode}"
            assert time.monotonic() < deadline, f"`{command}` is not ready after {START_TIMEOUT_S} s"
            time.sleep(0.1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def generate(url: str, num_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/generate", json.dumps({"input_ids": [5, 6, 7], "sampling_params": sampling}).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        content: dict[str, Any] = json.load(answer)
    return content


def test_every_launch_line_of_a_sweep_starts_a_server(tmp_path: Path) -> None:
    folder = published(tmp_path, served_result(measurement()))
    # One request at once, eight, and the loads at which speculation is off.
    lines = commands(folder, "### SGLang")
    drafted = []
    for line in lines:
        with pasted(line, tmp_path / "bin", folder, Behaviour()) as url:
            figures = generate(url, 20)["meta_info"]
            drafted.append(figures.get("spec_num_proposed_drafts", 0) // figures.get("spec_verify_ct", 1))
    # Chains 7-1-8 and 2-1-3 propose 7 and 2 tokens a step, and the target alone none.
    assert drafted == [7, 2, 0]


@pytest.mark.slow
def test_the_line_serves_the_draft_of_the_folder(tmp_path: Path) -> None:
    folder = published(tmp_path, result(measurement()))
    (line,) = commands(folder, "### SGLang")
    with pasted(line, tmp_path / "bin", folder, Behaviour(answers="model")) as url:
        answer = generate(url, 20)
    assert len(answer["output_ids"]) == 20
    # 3-1-4: at most 4 tokens a step.
    assert answer["meta_info"]["spec_verify_ct"] >= 5


def test_vllm_gets_its_words_through_the_shell(tmp_path: Path) -> None:
    folder = published(tmp_path, result(measurement()), publish=PublishConfig(repository="me/my-draft"))
    log = tmp_path / "calls"
    for name in ("hf", "vllm"):
        install(tmp_path / "bin", name, RECORDER.format(python=sys.executable, log=str(log)))
    (command,) = commands(folder, "### vLLM")
    environment = dict(os.environ, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    subprocess.run(["bash", "-e", "-c", command], cwd=tmp_path, env=environment, check=True, timeout=60)
    download, serve = map(json.loads, log.read_text().splitlines())
    assert download == ["download", "me/my-draft", "--include", "speculators/*", "--local-dir", "my-draft"]
    assert serve[:-1] == [
        *("serve", "my target", "--dtype", "bfloat16", "--tensor-parallel-size", "1", "--speculative-config")
    ]
    # Where `hf download` puts it.
    assert json.loads(serve[-1]) == {"method": "eagle3", "model": "my-draft/speculators", "num_speculative_tokens": 3}


def test_what_the_card_shows_is_there(tmp_path: Path) -> None:
    folder = published(tmp_path, served_result(measurement()))
    shown = re.findall(r"\]\(((?!http)[^)]*)\)", (folder / "README.md").read_text())
    assert set(shown) >= {"plots/speedup.png", "plots/throughput.png", "plots/acceptance.png"}
    assert [name for name in shown if not (folder / name).is_file()] == []
    assert (folder / "speculators/config.json").is_file()
