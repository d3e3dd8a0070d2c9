"""What the commands print and how they exit. Ctrl-C on a real build is in the slow test at the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.settings import Settings

from specforge_core import cli
from specforge_core.artifacts import Store
from specforge_core.facts import GateFailure, Rejected
from specforge_core.ledger import record_outcome
from tests import made_build
from tests.builds import recipe_of
from tests.factory import gpu_entry, make_factory, served_entry, tiny_entry
from tests.site import made_store
from tests.test_plan import build_all


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a manifest, entered, and no GPU."""
    make_factory(tmp_path, tiny_entry(), gpu_entry("big", 2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def test_prefect_reports_nothing_and_its_pages_advertise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().server.ui.show_promotional_content
    for name, value in cli.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    server = Settings().server
    assert (server.analytics_enabled, server.ui.show_promotional_content) == (False, False)


def test_plan_says_for_each_entry_what_a_build_would_do(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan"]) == 0
    printed = capsys.readouterr().out
    assert "tiny: eagle3 draft for target\n" in printed
    assert "big: eagle3 draft for target (big needs 2 GPUs, this host has 0)" in printed
    assert printed.count("never built") == 2
    assert not (factory / ".specbundle" / "entries").exists()


def test_plan_says_whose_code_will_run(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trusting = tiny_entry("trusting") | {"target": {"model": "target", "dtype": "float32", "trust_remote_code": True}}
    make_factory(factory, tiny_entry(), trusting)
    assert cli.main(["plan"]) == 0
    printed = capsys.readouterr().out
    assert "tiny: eagle3 draft for target\n" in printed
    assert "for target (trust_remote_code: Python code of the target's repository runs)\n" in printed


def test_plan_says_once_where_sglang_is_or_that_it_is_not(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan"]) == 0
    assert "SGLang" not in capsys.readouterr().out

    make_factory(factory, served_entry("one"), served_entry("two"))
    python = factory / "python"
    python.write_text("#!/bin/sh\necho 0.5.14\n")
    python.chmod(0o755)
    os.environ["SPECBUNDLE_SGLANG_PYTHON"] = str(python)
    assert cli.main(["plan"]) == 0
    assert capsys.readouterr().out.count(f"SGLang: 0.5.14 at {python}\n") == 1

    python.unlink()
    assert cli.main(["plan"]) == 0
    printed = capsys.readouterr().out
    assert f"SGLang: {python} has no SGLang (" in printed
    assert "set SPECBUNDLE_SGLANG_PYTHON to the interpreter of an environment that has it" in printed
    assert printed.count("never built") == 2


def test_plan_goes_on_after_an_entry_that_cannot_be_pinned(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_factory(factory, tiny_entry("lost") | {"target": {"model": "./gone"}}, tiny_entry())
    assert cli.main(["plan"]) == 2
    printed = capsys.readouterr().out
    assert "no model folder" in printed
    assert "never built" in printed


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        # tests/tiny.py: 259 tokens, 8 layers.
        ({"draft_vocab_size": 260}, "draft_vocab_size=260 is more than the target's 259 tokens; lower it"),
        (
            {"aux_layers": [1, 3, 7]},
            "EAGLE-3 reads the outputs of 3 ascending layers from 0 to 6 of a target of 8 layers, not [1, 3, 7]; "
            "set draft.aux_layers",
        ),
    ],
)
def test_plan_knows_what_the_target_allows_its_draft(
    factory: Path, capsys: pytest.CaptureFixture[str], draft: dict[str, Any], message: str
) -> None:
    entry = tiny_entry()
    make_factory(factory, entry | {"draft": entry["draft"] | draft})
    for command in (["plan"], ["plan", "--cost"]):
        assert cli.main(command) == 2
        captured = capsys.readouterr()
        assert message in " ".join((captured.out + captured.err).replace("│", " ").split()), command


def test_plan_without_a_hub_still_shows_what_a_new_entry_would_do(
    factory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("the Hub cannot be asked")

    monkeypatch.setattr(cli, "make_recipe", unreachable)
    assert cli.main(["plan", "--only", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "the Hub cannot be asked" in printed
    assert "never built" in printed

    # What an entry that has artifacts would do depends on what the Hub holds now.
    build_all(Store(factory / ".specbundle"), recipe_of(made_build.entry(name="tiny")), factory / "made")
    assert cli.main(["plan", "--only", "tiny"]) == 0
    assert "regenerate" not in capsys.readouterr().out


def test_list_shows_target_gpus_and_last_result(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(factory / ".specbundle")
    build_all(store, recipe_of(made_build.entry(name="tiny")), factory / "made")
    assert cli.main(["list"]) == 0
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert "being built again; before: acceptance length 3.00, speedup 2.00x" in rows["tiny"]
    assert "CPU" in rows["tiny"]
    assert "never built" in rows["big"]


def test_show_lists_artifacts_and_the_gates_that_failed(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(factory / ".specbundle")
    artifacts = build_all(store, recipe_of(made_build.entry(name="tiny")), factory / "made")
    failure = GateFailure(gate="min_speedup", suite="math", measured=1.1, required=1.5, message="too slow")
    record_outcome(store.root, "tiny", Rejected(failures=(failure,)))
    assert cli.main(["show", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert all(artifact.key in printed for artifact in artifacts.values())
    assert "tiny: rejected" in printed
    assert "gate min_speedup: too slow" in printed


def test_report_prints_the_last_measurements_and_writes_the_site(
    factory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made_store.make_store(factory / ".specbundle")
    assert cli.main(["report", "demo"]) == 0
    printed = capsys.readouterr().out
    assert "1.80x (1.60 to 2.00)" in printed
    assert "1.10x" not in printed
    site = factory / ".specbundle" / "site" / "index.html"
    assert printed.endswith(f"site: {site.as_uri()}\n")
    # The manifest's, never built, and all of the store's.
    pages = {path.stem for path in (site.parent / "entries").iterdir()}
    assert pages == {"tiny", "big", "demo", "llama", "worse"}
    # A tracker that was never there is not made.
    assert not list((factory / ".specbundle").glob("mlflow*"))

    assert cli.main(["report", "--out", str(factory / "elsewhere")]) == 0
    assert (factory / "elsewhere" / "index.html").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["build", "--only", "tinny"], "the manifest has no entry 'tinny'; did you mean tiny?"),
        (
            ["build", "--only", "big", "tiny"],
            "big needs 2 GPUs, this host has 0; build on a host that has them, or choose",
        ),
        (["build", "--no-publish", "--dry-run"], "a dry run says what publishing would change: leave out --dry-run"),
        (["plan", "--only", "tinny"], "the manifest has no entry 'tinny'; did you mean tiny?"),
        (["plan", "--json", "--disk", "2"], "only the cost depends on --disk, --json; add --cost"),
        (["plan", "--reports", "elsewhere"], "only the cost depends on --reports; add --cost"),
        (["show", "tinny"], "the manifest has no entry 'tinny'; did you mean tiny?"),
        (["show", "conversation", "--entry", "tiny"], "tiny has no conversations yet; `specbundle build --only tiny`"),
        (["report", "tiny"], "no report of tiny in"),
        (["report"], "no report of any entry in"),
        (["--manifest", "gone.yaml", "list"], "gone.yaml"),
        (["--manifest", "gone.yaml", "up"], "gone.yaml"),
        (["--store", "train.jsonl", "plan"], "the store train.jsonl is a file; name a folder with --store"),
        (["--store", "train.jsonl/in", "build"], "[Errno 20] Not a directory"),
        (["up", "--prefect-port", "8000", "--mlflow-port", "8000"], "are both 8000; choose two ports"),
    ],
)
def test_what_a_user_gets_wrong_is_one_message_and_status_2(
    factory: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["up", "--prefect-port", "99999"], "--prefect-port: 99999 is no port; choose one from 1 to 65535"),
        (["up", "--mlflow-port", "0"], "--mlflow-port: 0 is no port; choose one from 1 to 65535"),
        (["plan", "--cost", "--tokens-per-conversation", "0", "0"], "0 is no whole number from 1 on"),
        (["plan", "--cost", "--disk", "0"], "--disk: 0 is no number above 0"),
        (["plan", "--cost", "--disk", "-1"], "--disk: -1 is no number above 0"),
        (["plan", "--cost", "--disk", "nan"], "--disk: nan is no number above 0"),
        (["plan", "--cost", "--disk", "fast"], "--disk: fast is no number above 0"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_host_that_can_build_nothing_says_what_is_missing(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_factory(factory, gpu_entry("big", 2))
    assert cli.main(["build"]) == 2
    assert "none of the manifest's 1 entries can be built here: big needs 2 GPUs" in capsys.readouterr().err


def test_reading_commands_load_neither_prefect_nor_mlflow_nor_torch(factory: Path) -> None:
    code = (
        "import json, sys; from specforge_core import cli; status = cli.main(['list']);"
        "json.dump([status, sorted({'prefect', 'mlflow', 'torch', 'transformers'} & set(sys.modules))], sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stderr) == [0, []]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_ends_a_build_without_leftovers_and_the_next_goes_on(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    endless = tiny_entry()
    endless["training"] |= {"num_epochs": 5_000, "checkpoints_per_run": 1000}
    manifest = make_factory(tmp_path, endless)
    env = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "TMPDIR": str(tmp_path)}
    env.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "specforge_core.cli", "--manifest", str(manifest), "build"]
    log = tmp_path / "build.log"
    with log.open("w") as output:
        # A session of its own, so that the signal reaches it and its server as a terminal's Ctrl-C would.
        started = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    request.addfinalizer(started.kill)
    train = tmp_path / ".specbundle" / "train"
    deadline = time.monotonic() + 300
    while not list(train.glob(".building-*/metrics.jsonl")):
        assert started.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    family = psutil.Process(started.pid).children(recursive=True)
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(60) == 130, log.read_text()
    assert psutil.wait_procs(family, timeout=30)[1] == []
    assert "interrupted; the same command goes on from what is done" in log.read_text()
    planned = subprocess.run([*command[:-1], "plan"], env=env, capture_output=True, text=True, check=True)
    assert "an interrupted build goes on from where it was" in planned.stdout
