"""Tests of which implementation runs."""

import threading

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from specforge_core.kernels import dispatch


@triton.jit
def _add_row_sum(x_ptr, y_ptr, num_columns, num_rounds, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns, mask=columns < num_columns, other=0.0)
    for _ in range(num_rounds):
        x += tl.sum(x, axis=0)
    tl.store(y_ptr + columns, x, mask=columns < num_columns)


def add_row_sum(x: Tensor, num_rounds: int) -> Tensor:
    y = torch.empty_like(x)
    _add_row_sum[(1,)](x, y, x.numel(), num_rounds, BLOCK=4)
    return y


def test_kernels_run_on_the_device_of_the_tests(device: torch.device) -> None:
    x = torch.arange(3.0, device=device)
    assert dispatch.uses_triton("sum", x)
    assert add_row_sum(x, num_rounds=1).tolist() == [3.0, 4.0, 5.0]


def test_new_memory_is_nan_so_that_what_a_kernel_leaves_out_shows(device: torch.device) -> None:
    assert torch.empty(3, device=device).isnan().all()
    assert torch.empty_like(torch.zeros(2, device=device, dtype=torch.bfloat16)).isnan().all()


def test_references_are_used_on_request_and_in_float64(device: torch.device) -> None:
    with dispatch.references():
        assert not dispatch.uses_triton("sum", torch.zeros(1, device=device))
    assert not dispatch.uses_triton("sum", torch.zeros(1, device=device, dtype=torch.float64))
    assert dispatch.uses_triton("sum", torch.zeros(1, device=device))


def test_a_request_holds_in_every_thread(device: torch.device) -> None:
    # Autograd runs backward passes of a GPU in threads of its own.
    answers: list[bool] = []
    x = torch.zeros(1, device=device)
    with dispatch.references():
        thread = threading.Thread(target=lambda: answers.append(dispatch.uses_triton("sum", x)))
        thread.start()
        thread.join()
    assert answers == [False]
    assert dispatch.uses_triton("sum", x)


def test_the_interpreter_refuses_kernels_that_were_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 before"), dispatch.interpreter():
        pass
