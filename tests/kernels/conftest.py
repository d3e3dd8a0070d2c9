"""Every kernel test runs Triton (on the GPU if there is one, else in its interpreter) on outputs that start as NaN."""

from collections.abc import Iterator

import pytest
import torch

from specforge_core.kernels import dispatch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _triton_runs(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        yield
    else:
        with dispatch.interpreter():
            yield


@pytest.fixture(autouse=True)
def _new_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # PyTorch fills what torch.empty returns only while algorithms must be deterministic.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
