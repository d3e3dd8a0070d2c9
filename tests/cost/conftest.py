"""An entry for Llama 3.1 8B, rates in round numbers, and no Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specforge_core.cost.configs import ConfigReader, FoundConfig
from specforge_core.cost.hardware import find_hardware
from specforge_core.cost.job import Job, make_job
from specforge_core.cost.rates import Point, Rates, load_rates
from specforge_core.manifest import ManifestEntry

REPORTS = Path(__file__).parents[2] / "reports"
RATES = Rates(
    hardware=find_hardware("h100"),
    # 500 TFLOP/s and 10 ms a pass.
    passes=(Point(50e12, 0.110), Point(100e12, 0.210)),
    float8_passes=(),
    optimizer_bytes_per_s=2e12,
    matmul_flops=800e12,
    # 6 bytes for each weight, and 2 GB.
    activation_bytes=(Point(1e8, 2.6e9), Point(1e9, 8e9)),
    # 500 TFLOP/s.
    captures=(Point(500e12, 1.0),),
    # 1 TB/s.
    answers=(Point(1e12, 1.0),),
    step_runs=(),
    read_bytes_per_s=1e12,
    write_bytes_per_s=1e12,
    source="made up",
)


@pytest.fixture(scope="session")
def rates() -> Rates:
    """Those that were measured."""
    return load_rates(REPORTS)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: ConfigReader, target: object) -> FoundConfig | None:
        return None

    monkeypatch.setattr(ConfigReader, "_from_hub", unreachable)


def entry_of(model: str = "meta-llama/Llama-3.1-8B-Instruct", **sections: Any) -> ManifestEntry:
    """1,000 conversations, two suites of which one is measured, no sweep; `sections` are merged in."""
    values: dict[str, Any] = {
        "name": "made-up",
        "target": {"model": model},
        "data": {"sources": [{"dataset": "some/data", "limit": 1000}], "max_new_tokens": 2048},
        "training": {"tokens_per_batch": 65536, "tokens_per_micro_batch": 8192},
        "benchmark": {"suites": [{"name": "math", "source": {"dataset": "openai/gsm8k", "limit": 50}}]},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return ManifestEntry.model_validate(values)


@pytest.fixture
def job_of(tmp_path: Path) -> Callable[..., Job]:
    def make(entry: ManifestEntry, *, hardware: str = "h100", rates: Rates = RATES) -> Job:
        return make_job(
            entry,
            configs=ConfigReader(tmp_path),
            store=None,
            rates=rates,
            hardware=find_hardware(hardware),
            tokens_per_conversation=(100, 200),
        )

    return make
