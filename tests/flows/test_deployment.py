"""The real thing: `specbundle up` with its server and worker, deployment runs on a tiny real target, cancelled ones."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import psutil
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.events import Event, Resource
from prefect.events.clients import get_events_client
from prefect.events.related import tags_as_related_resources
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Running

from flows.specbundle import specbundle
from flows.up import DEPLOYMENTS
from specforge_core.gpus import list_gpus
from specforge_core.ledger import load_entry_record
from tests.factory import gpu_entry, make_factory, tiny_entry
from tests.test_security import LOOPBACK, listening

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]


class Services(NamedTuple):
    """A running `specbundle up`."""

    process: psutil.Process
    env: dict[str, str]
    log: Path

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        return subprocess.run(command, env=self.env, cwd=REPOSITORY, capture_output=True, text=True)

    def run(self, *options: str, deployment: str = "specbundle/build") -> subprocess.CompletedProcess[str]:
        return self.prefect("deployment", "run", deployment, *options)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(is_so: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {timeout_s:g} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    home = tmp_path_factory.mktemp("up")
    port = free_port()
    # A temporary folder of its own also holds the leases: a build elsewhere on this host is not waited for.
    env = {**os.environ, "PREFECT_HOME": str(home / "prefect"), "TMPDIR": str(home), "OMP_NUM_THREADS": "2"}
    env["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    ports = ["--prefect-port", str(port), "--mlflow-port", str(free_port())]
    command = [sys.executable, "-m", "specforge_core.cli", "--manifest", str(make_factory(home)), "up", *ports]
    log = home / "up.log"
    with log.open("w") as output:
        # Not in the repository, whose prefect.yaml it takes all the same.
        started = subprocess.Popen(command, env=env, cwd=home, stdout=output, stderr=subprocess.STDOUT)
    process = psutil.Process(started.pid)
    try:
        wait_until(lambda: re.search(r"Worker .* started", log.read_text()) or started.poll() is not None, 240)
        assert started.poll() is None, log.read_text()
        yield Services(process, env, log)
    finally:
        family = process.children(recursive=True) if process.is_running() else []
        started.send_signal(signal.SIGINT)
        started.wait(60)
        assert psutil.wait_procs(family, timeout=30)[1] == [], "`specbundle up` left processes"


def test_a_deployment_run_builds_and_publishes(tmp_path: Path, services: Services) -> None:
    manifest = make_factory(tmp_path)
    finished = services.run("-p", 'only=["tiny"]', "-p", f'manifest="{manifest}"', "--watch")
    assert finished.returncode == 0, finished.stdout + services.log.read_text()
    published = tmp_path / ".specbundle/published/tiny"
    assert {file.name for file in published.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "README.md",
        "lineage.json",
    }

    before = published.resolve()
    again = services.run("-p", f'manifest="{manifest}"', "--watch", deployment="rebenchmark/run")
    assert again.returncode == 0, again.stdout + services.log.read_text()
    # The same engine on the same processor: nothing to renew.
    assert published.resolve() == before


def test_a_deployment_run_that_is_given_nothing_builds_the_manifest_of_up(services: Services) -> None:
    for deployment in ("specbundle/build", "rebenchmark/run"):
        shown = services.prefect("deployment", "inspect", deployment, "--output", "json")
        parameters = json.loads(shown.stdout)["parameters"]
        assert parameters == {"manifest": str(services.log.parent / "bundle_manifest.yaml")}


def test_everything_that_is_started_listens_on_loopback_alone(services: Services) -> None:
    found = listening(services.process)
    said = re.findall(r"^(?:Prefect|MLflow): +http://127\.0\.0\.1:(\d+)$", services.log.read_text(), re.MULTILINE)
    ports = set(map(int, said))
    assert {port for _, port in found} >= ports
    assert len(ports) == 2, "Prefect's and MLflow's"
    assert {ip for ip, _ in found} <= LOOPBACK, found


class Received(ThreadingHTTPServer):
    """Keeps the texts that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ReceivedHandler)
        self.texts: list[str] = []


class ReceivedHandler(BaseHTTPRequestHandler):
    server: Received

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.texts.append(json.loads(body)["text"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def webhook() -> Iterator[Received]:
    server = Received()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_run_that_fails_calls_the_webhook_with_the_reason(
    tmp_path: Path, services: Services, webhook: Received
) -> None:
    # As the file's own head says.
    head = (REPOSITORY / "pools/automations.yaml").read_text().split("automations:")[0]
    commands = "\n".join(line.removeprefix("#").strip() for line in head.splitlines() if line.startswith("#   "))
    script = commands.replace("https://hooks.slack.com/services/...", f"http://127.0.0.1:{webhook.server_port}/hook")
    assert f":{webhook.server_port}/hook" in script
    script = script.replace("> automations.yaml", f"> {tmp_path}/automations.yaml")
    script = script.replace("--from-file automations.yaml", f"--from-file {tmp_path}/automations.yaml")
    env = services.env | {"PATH": f"{Path(sys.executable).parent}:{services.env['PATH']}"}
    created = subprocess.run(["bash", "-ec", script], env=env, cwd=REPOSITORY, capture_output=True, text=True)
    assert "Created 2 automation(s)" in created.stdout, created.stdout + created.stderr
    assert f":{webhook.server_port}" not in (tmp_path / "automations.yaml").read_text(), "the address is a secret"

    manifest = make_factory(tmp_path)
    # One that nobody has published yet.
    failed = services.run(
        "-p", f'manifest="{manifest}"', "-p", 'only=["tiny"]', "--watch", deployment="rebenchmark/run"
    )
    assert failed.returncode == 1
    wait_until(lambda: webhook.texts, 60)
    # The server takes an event again when SQLite was locked meanwhile, and then says the same again.
    (text,) = set(webhook.texts)
    assert text.startswith("rebenchmark tiny ")
    assert "is Failed: 1 of 1 entries did not pass: tiny; tiny: ValueError: no draft of tiny is published" in text
    assert "/runs/flow-run/" in text


def test_a_deployment_run_with_a_failing_entry_exits_with_failure(tmp_path: Path, services: Services) -> None:
    strict = tiny_entry("strict") | {"gates": {"min_acceptance_length": 4.0, "min_speedup": 0.0}}
    manifest = make_factory(tmp_path, strict, tiny_entry())
    finished = services.run("-p", f'manifest="{manifest}"', "--watch")
    assert finished.returncode == 1, finished.stdout + services.log.read_text()
    assert "1 of 2 entries did not pass: strict" in services.log.read_text()
    assert (tmp_path / ".specbundle/published/tiny").is_dir()
    assert not (tmp_path / ".specbundle/published/strict").exists()


def test_a_cancelled_run_leaves_no_stage_behind(tmp_path: Path, services: Services) -> None:
    endless = tiny_entry("endless")
    endless["training"] |= {"num_epochs": 5_000}
    manifest = make_factory(tmp_path, endless)
    started = services.run("-p", f'manifest="{manifest}"')
    found = re.search(r"UUID: ([0-9a-f-]{36})", started.stdout)
    assert found, started.stdout

    def stages() -> list[psutil.Process]:
        return [child for child in services.process.children(recursive=True) if str(tmp_path) in command_of(child)]

    wait_until(lambda: any(" train " in command_of(stage) for stage in stages()), 240)
    state = asyncio.run(cancel(services.env["PREFECT_API_URL"], UUID(found[1])))
    assert state == "CANCELLED"
    assert stages() == []


def heartbeat(run: UUID, tags: set[str]) -> Event:
    """What a run's process sends every 30 seconds."""
    return Event(
        event="prefect.flow-run.heartbeat",
        resource=Resource({"prefect.resource.id": f"prefect.flow-run.{run}"}),
        related=tags_as_related_resources(tags),
    )


def test_a_run_that_falls_silent_becomes_crashed(tmp_path: Path, services: Services) -> None:
    (_, lost) = yaml.safe_load((REPOSITORY / "pools/automations.yaml").read_text())["automations"]
    # Ten minutes are long; ten seconds are the least that Prefect takes.
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(lost | {"trigger": lost["trigger"] | {"within": 10}}))
    created = services.prefect("automation", "create", "--from-file", str(tmp_path / "lost.yaml"))
    assert created.returncode == 0, created.stdout + created.stderr

    async def run_and_fall_silent() -> list[str]:
        """States of a run that falls silent, and of one that nobody expects to hear of."""
        # Not `emit_event`: its sender stays with the server that this process first sent an event to.
        async with get_client() as client, get_events_client() as events:
            runs = [
                await client.create_flow_run(specbundle, state=Running(), tags=tags) for tags in (["specbundle"], [])
            ]
            # A server that does not know the automation yet forgets the first of them.
            for _ in range(4):
                for run, tags in zip(runs, ({"specbundle"}, set()), strict=True):
                    await events.emit(heartbeat(run.id, tags))
                for _ in range(150):
                    states = [(await client.read_flow_run(run.id)).state for run in runs]
                    names = [state.name for state in states if state]
                    if names[0] != "Running":
                        return names
                    await asyncio.sleep(0.2)
            return names

    try:
        with temporary_settings({PREFECT_API_URL: services.env["PREFECT_API_URL"]}):
            assert asyncio.run(run_and_fall_silent()) == ["Crashed", "Running"]
    finally:
        # Real runs are silent for 30 s.
        deleted = services.prefect("automation", "delete", "--all")
        assert deleted.returncode == 0, deleted.stdout + deleted.stderr


def test_every_pool_and_deployment_of_the_fleet_is_one_that_a_server_takes(services: Services) -> None:
    pytest.importorskip("prefect_docker")
    pytest.importorskip("prefect_kubernetes")
    pools = (
        ("specbundle-docker", "--type", "docker"),
        ("specbundle-kubernetes", "--type", "kubernetes", "--base-job-template", "pools/kubernetes.json"),
    )
    deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    # Those of `up` have its manifest by now.
    fleet = [word for one in deployments if one["name"] not in DEPLOYMENTS for word in ("--name", one["name"])]
    for arguments in (*(("work-pool", "create", *pool) for pool in pools), ("deploy", *fleet)):
        done = services.prefect(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    for name, variable, value in (("docker", "auto_remove", "True"), ("kubernetes", "gpus", "8")):
        shown = services.prefect("deployment", "inspect", f"specbundle/build-{name}")
        assert re.search(f"'work_pool_name': 'specbundle-{name}'", shown.stdout), shown.stdout
        assert re.search(f"'{variable}': {value}", shown.stdout), shown.stdout


class RecordedStage(NamedTuple):
    """Where and when a stage ran, by `recorded_build.py`."""

    stage: str
    key: str
    pid: int
    devices: list[str]
    started_at: float
    stopped_at: float

    def runs_at(self, moment: float) -> bool:
        return self.started_at <= moment < self.stopped_at


def run_recorded(tmp_path: Path, services: Services, num_gpus: int, env: dict[str, str]) -> None:
    """One deployment run over three entries, on a host with so many GPUs: the leases must be as the entries ask.

    On two GPUs one of the entries waits. On four all are built at once, one of them on two.
    """
    wanted = {"one": 1, "two": 1, "three": num_gpus // 2}
    entries = [gpu_entry(name, number) for name, number in wanted.items()]
    for number, entry in enumerate(entries, 1):
        # So that they share no artifact from training on.
        entry["training"] = entry["training"] | {"learning_rate": number * 1e-3}
    manifest, recording = make_factory(tmp_path, *entries), tmp_path / "recording.jsonl"
    entrypoint = "tests/flows/recorded_build.py:specbundle"
    deployed = services.prefect("deploy", entrypoint, "--name", "recorded", "--pool", "specbundle")
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    job_env = json.dumps({"RECORDING": str(recording), **env})
    options = ["-p", f'manifest="{manifest}"', "--job-variable", f"env={job_env}", "--watch"]
    finished = services.run(*options, deployment="specbundle/recorded")
    # Benchmarks beside each other on a few cores disturb each other, so what the gates say of them is no matter here.
    records = [load_entry_record(tmp_path / ".specbundle", name) for name in wanted]
    failed = [record.name for record in records if record.outcome is None]
    assert not failed, f"{failed}\n" + finished.stdout + finished.stderr + services.log.read_text()
    stages = [RecordedStage(**json.loads(line)) for line in recording.read_text().splitlines()]
    askers = [(key, wanted[record.name]) for record in records for key in record.keys.values()]
    check_leases(stages, num_gpus, askers)


def check_leases(stages: list[RecordedStage], num_gpus: int, askers: list[tuple[str, int]]) -> None:
    """As many devices a stage as an entry asks for, one stage a device at a time, and all devices at work at once.

    Args: askers: key of a stage and number of devices, for each entry that needs the stage.
    """
    # Targets and data are the same, so what comes before training is built once.
    counts = Counter(stage.stage for stage in stages)
    assert counts == {"regenerate": 1, "vocabulary": 1, "capture": 1, "train": 3, "export": 3, "benchmark": 3}
    assert len({stage.pid for stage in stages}) == len(stages)
    assert all(stage.devices == [] for stage in stages if stage.stage in ("vocabulary", "export"))
    leased = [stage for stage in stages if stage.stage not in ("vocabulary", "export")]
    assert [stage for stage in leased if (stage.key, len(stage.devices)) not in askers] == []
    # Of stages that share a moment one begins in it.
    in_use = [
        sorted(device for stage in leased if stage.runs_at(moment) for device in stage.devices)
        for moment in (stage.started_at for stage in leased)
    ]
    assert [devices for devices in in_use if len(set(devices)) < len(devices)] == []
    assert [str(device) for device in range(num_gpus)] in in_use


@pytest.mark.parametrize("num_gpus", [2, 4])
def test_entries_of_a_deployment_run_share_gpus_and_never_one(
    tmp_path: Path, services: Services, num_gpus: int
) -> None:
    # What the real one prints on such a host. The stages compute on the CPU all the same.
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    listed = "".join(f"echo '{index}, GPU-{index}, Made-up GPU'\n" for index in range(num_gpus))
    program.write_text(f"#!/bin/sh\n{listed}")
    program.chmod(0o755)
    env = {"PATH": f"{program.parent}:{os.environ['PATH']}", "RECORDING_DEVICE": "cpu"}
    run_recorded(tmp_path, services, num_gpus, env)


@pytest.mark.gpu
@pytest.mark.parametrize("num_gpus", [2, 4])
def test_entries_of_a_deployment_run_share_real_gpus_and_never_one(
    tmp_path: Path, services: Services, num_gpus: int
) -> None:
    if len(list_gpus(None)) < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    visible = ",".join(str(device) for device in range(num_gpus))
    run_recorded(tmp_path, services, num_gpus, {"CUDA_VISIBLE_DEVICES": visible})


def command_of(process: psutil.Process) -> str:
    """Its command line; empty for one that has ended meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


async def cancel(api_url: str, run_id: UUID) -> str:
    """The type of the state that the run ends in."""
    with temporary_settings({PREFECT_API_URL: api_url}):
        async with get_client() as client:
            await client.set_flow_run_state(run_id, Cancelling())
            for _ in range(300):
                run = await client.read_flow_run(run_id)
                if run.state and run.state.is_final():
                    return run.state.type.value
                await asyncio.sleep(0.2)
    return "still running after 60 s"
