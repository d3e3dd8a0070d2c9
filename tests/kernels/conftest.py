"""Every kernel test runs Triton (on the GPU if there is one, else in its interpreter) on outputs that start as NaN."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

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


@pytest.fixture(autouse=True)
def _interpreted_loops_take_numbers_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton 3.6's interpreter takes int() of an array with one dimension, which numpy 2.4 refuses.
    # TODO: delete when the constraints have a Triton whose `range(num_rows)` runs in the interpreter without this.
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
