"""Leases of devices between real processes, and what a host says it computes on."""

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from specforge_core import gpus
from specforge_core.gpus import cpu_name, lease_devices, list_gpus, visible_devices

DEVICES = ("0", "1", "2", "3")

HOLDER = textwrap.dedent("""
    import pathlib, sys, time
    from specforge_core.gpus import lease_devices
    with lease_devices(int(sys.argv[1]), devices=sys.argv[3].split(","), lock_dir=pathlib.Path(sys.argv[2])) as lease:
        print(",".join(lease.devices), flush=True)
        sys.stdin.read()
""")


def start_holder(num_devices: int, lock_dir: Path, devices: tuple[str, ...] = DEVICES) -> subprocess.Popen[str]:
    """Another process that asks for a lease, prints what it got and holds it until its input closes."""
    command = [sys.executable, "-c", HOLDER, str(num_devices), str(lock_dir), ",".join(devices)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def leased_by(holder: subprocess.Popen[str]) -> tuple[str, ...]:
    assert holder.stdout is not None
    return tuple(holder.stdout.readline().strip().split(","))


def test_two_processes_never_get_one_device(tmp_path: Path) -> None:
    holders = [start_holder(2, tmp_path), start_holder(1, tmp_path)]
    taken = [device for holder in holders for device in leased_by(holder)]
    with lease_devices(1, devices=DEVICES, lock_dir=tmp_path) as lease:
        assert sorted([*taken, *lease.devices]) == list(DEVICES)
        with (
            pytest.raises(TimeoutError, match=r"no 1 of 4 devices became free in 0\.5 s"),
            lease_devices(1, devices=DEVICES, lock_dir=tmp_path, timeout_s=0.5),
        ):
            pass
    for holder in holders:
        holder.communicate()


def test_a_killed_holder_gives_its_devices_back(tmp_path: Path) -> None:
    holder = start_holder(4, tmp_path)
    assert leased_by(holder) == DEVICES
    holder.kill()
    holder.communicate()
    with lease_devices(4, devices=DEVICES, lock_dir=tmp_path, timeout_s=2) as lease:
        assert lease.devices == DEVICES


def test_two_that_want_everything_take_turns(tmp_path: Path) -> None:
    # If each could keep half while waiting for the rest, neither would ever have all.
    holders = [start_holder(4, tmp_path) for _ in range(3)]
    for holder in holders:
        assert holder.stdin is not None
        holder.stdin.close()
        holder.stdin = None
    for holder in holders:
        assert holder.communicate(timeout=20)[0].strip() == "0,1,2,3"


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    at_once, most = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal at_once, most
        with lease_devices(1, devices=("cpu",), lock_dir=tmp_path):
            with guard:
                at_once += 1
                most = max(most, at_once)
            time.sleep(0.02)
            with guard:
                at_once -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_more_devices_than_there_are_is_refused_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="8 devices wanted, but this host has 2: 0, 1"),
        lease_devices(8, devices=("0", "1"), lock_dir=tmp_path),
    ):
        pass


def test_waiting_ends_when_the_build_is_cancelled(tmp_path: Path) -> None:
    cancelled = threading.Event()
    with lease_devices(1, devices=("0",), lock_dir=tmp_path):
        threading.Timer(0.3, cancelled.set).start()
        with (
            pytest.raises(InterruptedError, match="stopped while waiting for 1 of 1 devices"),
            lease_devices(1, devices=("0",), lock_dir=tmp_path, cancelled=cancelled),
        ):
            pass


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `nvidia-smi` that prints what the real one prints on a host with two."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-aa, NVIDIA H100 80GB HBM3'\necho '1, GPU-bb, NVIDIA H200, SXM'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1,0", ["1", "0"]),
        ("GPU-bb", ["GPU-bb"]),
        ("", []),
        # As CUDA does: nothing from the first unknown id on.
        ("0,7,1", ["0"]),
    ],
)
def test_cuda_visible_devices_restricts_the_gpus(visible: str | None, ids: list[str]) -> None:
    assert [gpu.id for gpu in list_gpus(visible)] == ids


@pytest.mark.usefixtures("two_gpus")
def test_a_process_may_use_the_gpus_of_its_lease_and_all_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible_devices() == ("1",)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_devices() == ("0", "1")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_has_its_product_name() -> None:
    assert [gpu.name for gpu in list_gpus(None)] == ["NVIDIA H100 80GB HBM3", "NVIDIA H200, SXM"]


def test_a_host_without_nvidia_smi_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus(None) == ()


def test_a_driver_that_fails_counts_as_no_gpu_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setattr(gpus.shutil, "which", lambda name: str(program))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert list_gpus(None) == ()
    assert "Driver/library version mismatch" in caplog.text


def test_the_cpu_has_the_name_that_linux_gives_it() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "model name" not in cpuinfo.read_text():
        pytest.skip("this system does not name its processor in /proc/cpuinfo")
    assert f": {cpu_name()}\n" in cpuinfo.read_text()
