"""The report task, as a function: its files lie in the store and with the tracked run, plots included."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from specforge_core.benchmark.compare import Standing
from specforge_core.benchmark.history import load_history
from tasks import report as report_module
from tasks import tracking
from tasks.report import report
from tests import builds, made_build


def test_the_report_and_its_plots_are_kept_by_the_store_and_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shown: list[dict[str, Any]] = []
    # Needs an API, which only a flow has.
    monkeypatch.setattr(report_module, "create_markdown_artifact", lambda **artifact: shown.append(artifact))
    run = tracking.start_run(tracking.ENTRIES, "demo", store=tmp_path, tags={})
    made = made_build.served_result(made_build.measurement())
    build = builds.entry_build(tmp_path, tracking=run)
    report.fn(build, made_build.artifacts(tmp_path / "artifacts", made), (), Standing())

    names = ["demo-acceptance.svg", "demo-speedup.svg", "demo-throughput.svg", "demo.json", "demo.md"]
    assert sorted(path.name for path in (tmp_path / "reports").iterdir() if path.is_file()) == names
    (recorded,) = load_history(tmp_path, "demo").reports
    assert recorded.report.benchmark == made
    assert run.run_id is not None
    client = MlflowClient(run.uri)
    assert sorted(file.path for file in client.list_artifacts(run.run_id)) == names
    assert client.get_run(run.run_id).data.metrics["accept_length/math"] == 3.0
    (artifact,) = shown
    assert "At which load" in artifact["markdown"]
    # On that page the files would not be found.
    assert "![" not in artifact["markdown"]
