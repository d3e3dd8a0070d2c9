"""`specbundle plan --cost` over the repository's own manifest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specforge_core import cli
from specforge_core.artifacts import Store
from specforge_core.cost import check
from specforge_core.cost.entry import CostPlanner
from specforge_core.manifest import Manifest
from specforge_core.manifest_sections import DataConfig, PromptSource
from tests import made_build
from tests.builds import recipe_of
from tests.test_plan import build_all

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "bundle_manifest.yaml"


def test_every_entry_of_the_manifest_is_counted_without_torch_and_without_network(tmp_path: Path) -> None:
    code = (
        "import json, sys; from specforge_core import cli; status = cli.main(sys.argv[1:]);"
        "json.dump([status, sorted({'prefect', 'mlflow', 'torch', 'transformers'} & set(sys.modules))], sys.stderr)"
    )
    arguments = ["--manifest", str(MANIFEST), "--store", str(tmp_path / "store"), "plan", "--cost"]
    # Neither a network nor what an earlier one left.
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "COLUMNS": "200"}
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=offline, capture_output=True, text=True, timeout=60
    )
    assert json.loads(ran.stderr) == [0, []], ran.stderr
    names = [entry.name for entry in Manifest.load(MANIFEST).entries]
    assert {"qwen3-235b-a22b-instruct-2507", "kimi-k2-instruct", "demo"} <= set(names)
    for name in names:
        assert f"\n{name}: " in f"\n{ran.stdout}"
    assert ran.stdout.count("sizes that ship with this program, as the Hub gives none") == len(names) - 1
    assert "Rates are scaled from h100: training of llama-3.1-8b" in ran.stdout


def test_json_has_tokens_bytes_and_hours_of_each_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--manifest", str(MANIFEST), "--store", str(tmp_path)]
    options = ["--hardware", "h200", "--tokens-per-conversation", "300", "500", "--disk", "10", "--json"]
    assert cli.main([*arguments, "plan", "--cost", "--only", "llama-3.1-8b-instruct", *options]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    stages = {stage["stage"]: stage for stage in entry["stages"]}
    assert list(stages) == ["regenerate", "vocabulary", "capture", "train", "export", "benchmark"]
    assert (entry["hardware"], entry["num_parameters"]) == ("h200", 8_030_261_248)
    assert stages["regenerate"]["num_tokens"] == 100_000 * 500
    assert stages["capture"]["num_tokens"] == 100_000 * 800
    assert all(stages[name]["gpu_hours"] > 0 for name in ("regenerate", "capture", "train", "benchmark"))


def test_an_entry_that_cannot_be_counted_is_named_and_hides_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = MANIFEST.read_text(encoding="utf-8").replace("Qwen/Qwen3-8B}", "nobody/nothing}")
    (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
    only = ["--only", "qwen3-8b", "gpt-oss-20b"]
    assert cli.main(["--manifest", str(tmp_path / "m.yaml"), "plan", "--cost", *only]) == 2
    captured = capsys.readouterr()
    assert "qwen3-8b: the Hub gives no config.json of nobody/nothing" in captured.err
    assert "gpt-oss-20b: openai/gpt-oss-20b, 20.91 B parameters, 3.6 B of them active" in captured.out


def test_a_cpu_build_costs_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--manifest", str(MANIFEST), "plan", "--cost", "--only", "demo"]) == 0
    assert "measured on 4 cores of" in capsys.readouterr().out


def test_hardware_without_figures_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--manifest", str(MANIFEST), "plan", "--cost", "--hardware", "abacus"]) == 2
    assert 'no figures of the GPU "abacus"' in capsys.readouterr().err


def test_the_recorded_rows_are_checked_by_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) == 0
    assert "training pass, llama-3.3-70b" in capsys.readouterr().out


def test_a_builds_artifacts_are_held_against_its_cost(tmp_path: Path) -> None:
    source = PromptSource(dataset="builtin:demo", limit=50)
    entry, store = made_build.entry(data=DataConfig(sources=(source,))), Store(tmp_path / "store")
    planner = CostPlanner(base_dir=tmp_path, store=store, reports=ROOT / "reports")
    with pytest.raises(ValueError, match="no artifacts of"):
        check.build_checks(entry, planner.cost(entry), store)
    build_all(store, recipe_of(entry), tmp_path / "made")
    checks = check.build_checks(entry, planner.cost(entry), store)
    # Its stages took a second, so only bytes are compared: made-up ones, which are far off.
    assert [one.what for one in checks] == ["capture, bytes"]
    assert not checks[0].is_close
