"""What `prefect.yaml` says, read by Prefect's own models and held against the flow and the templates of its pools."""

import asyncio
import inspect
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, WorkPoolConfig
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.flows import load_flow_from_entrypoint
from prefect.server.events.schemas.automations import AutomationCore as ServerAutomation
from prefect.utilities.schema_tools.validation import validate
from prefect.workers.process import ProcessWorker

from flows.up import DEPLOYMENTS, POOL
from specforge_core.manifest import Manifest
from tasks import stage as stage_module

ROOT = Path(__file__).parents[2]
NAMES = ("build", "run", "build-docker", "run-docker", "build-kubernetes", "run-kubernetes")


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def deployments(raw: dict[str, Any]) -> dict[str, DeploymentConfig]:
    return {deployment.name or "": deployment for deployment in PrefectYamlModel.model_validate(raw).deployments}


def template_of(pool: str) -> dict[str, Any]:
    """The base job template that a pool is created with."""
    if pool == "specbundle-kubernetes":
        template: dict[str, Any] = json.loads((ROOT / "pools/kubernetes.json").read_text())
        return template
    if pool == "specbundle-docker":
        return pytest.importorskip("prefect_docker.worker").DockerWorker.get_default_base_job_template()
    return ProcessWorker.get_default_base_job_template()


def pool_of(deployment: DeploymentConfig) -> WorkPoolConfig:
    assert deployment.work_pool is not None
    return deployment.work_pool


def test_each_pool_has_its_deployment_and_no_key_is_misspelled(
    raw: dict[str, Any], deployments: dict[str, DeploymentConfig]
) -> None:
    # Prefect ignores what it does not know.
    assert raw.keys() <= {*PrefectYamlModel.model_fields, "definitions"}
    for entry in raw["deployments"]:
        assert entry.keys() <= DeploymentConfig.model_fields.keys()
        assert entry["work_pool"].keys() <= WorkPoolConfig.model_fields.keys()
    assert tuple(deployments) == NAMES
    pools = [pool_of(deployment).name for deployment in deployments.values()]
    assert pools == ["specbundle"] * 2 + ["specbundle-docker"] * 2 + ["specbundle-kubernetes"] * 2
    assert {name: pool_of(deployments[name]).name for name in DEPLOYMENTS} == {"build": POOL, "run": POOL}


@pytest.mark.parametrize("name", NAMES)
def test_a_deployment_runs_the_flow_with_parameters_that_it_takes(
    name: str, deployments: dict[str, DeploymentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    deployment = deployments[name]
    assert deployment.entrypoint is not None
    flow = load_flow_from_entrypoint(deployment.entrypoint)
    assert flow.name == {"build": "specbundle", "run": "rebenchmark"}[name.partition("-")[0]]
    assert deployment.parameters.keys() <= inspect.signature(flow.fn).parameters.keys()
    parameters = flow.validate_parameters(deployment.parameters)
    assert Manifest.load(parameters["manifest"]).entries
    # A run in a container leaves nothing in its image.
    assert (parameters.get("store") is None) == (name in DEPLOYMENTS)


@pytest.mark.parametrize("name", NAMES)
def test_job_variables_are_what_the_template_of_the_pool_takes(
    name: str, deployments: dict[str, DeploymentConfig]
) -> None:
    pool = pool_of(deployments[name])
    schema = template_of(pool.name or "")["variables"]
    assert pool.job_variables.keys() <= schema["properties"].keys()
    validate(pool.job_variables, schema, raise_on_error=True, ignore_required=False)


@pytest.mark.parametrize(("variable", "value"), [("gpus", "eight"), ("image_pull_policy", "Sometimes")])
def test_a_wrong_job_variable_does_not_pass(
    variable: str, value: str, deployments: dict[str, DeploymentConfig]
) -> None:
    schema = template_of("specbundle-kubernetes")["variables"]
    wrong = pool_of(deployments["build-kubernetes"]).job_variables | {variable: value}
    with pytest.raises(Exception, match=value):
        validate(wrong, schema, raise_on_error=True, ignore_required=False)


def configuration_of(worker: Any, deployment: DeploymentConfig) -> Any:
    """What that pool's worker makes of a run of this deployment."""
    pool = pool_of(deployment)
    return asyncio.run(
        worker.job_configuration.from_template_and_values(template_of(pool.name or ""), pool.job_variables)
    )


@pytest.mark.usefixtures("prefect_engine")
def test_a_kubernetes_run_is_a_pod_with_gpus_memory_and_the_shared_data(
    deployments: dict[str, DeploymentConfig],
) -> None:
    worker = pytest.importorskip("prefect_kubernetes.worker").KubernetesWorker
    # Prefect's own check of the manifest is part of it.
    configuration = configuration_of(worker, deployments["build-kubernetes"])
    spec = configuration.job_manifest["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["image"] == "specbundle:0.1.0"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "memory": "512Gi"}
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in spec["volumes"]}
    assert volumes[mounted["/data"]] == {"persistentVolumeClaim": {"claimName": "specbundle-data"}}
    assert volumes[mounted["/dev/shm"]] == {"emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}}
    assert spec["nodeSelector"] == {}
    assert configuration.namespace == "specbundle"
    assert "{{" not in json.dumps(configuration.job_manifest["spec"]["template"]["spec"]["volumes"])


def test_every_variable_of_the_kubernetes_pool_is_used_and_every_one_that_is_used_is_there() -> None:
    template = template_of("specbundle-kubernetes")
    text = json.dumps(template["job_configuration"])
    used = {part.partition(" }}")[0] for part in text.split("{{ ")[1:]}
    assert used == template["variables"]["properties"].keys()


@pytest.mark.usefixtures("prefect_engine")
def test_a_docker_run_is_a_container_with_gpus_shared_memory_and_leases_that_others_see(
    deployments: dict[str, DeploymentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = pytest.importorskip("prefect_docker.worker").DockerWorker
    types = pytest.importorskip("docker.types")
    configuration = configuration_of(worker, deployments["build-docker"])
    assert configuration.image == "specbundle:0.1.0"
    # What docker's own client makes of it for the daemon.
    host = types.HostConfig("1.47", binds=configuration.volumes, **configuration.container_create_kwargs)
    (gpus,) = host["DeviceRequests"]
    assert (gpus["Driver"], gpus["Count"], gpus["Capabilities"]) == ("nvidia", -1, [["gpu"]])
    assert host["ShmSize"] == 64 * 2**30
    mounts = dict(reversed(volume.split(":")) for volume in host["Binds"])
    # In a container of the image, temporary files are in /tmp and the user is its user.
    monkeypatch.setattr(stage_module.tempfile, "gettempdir", lambda: "/tmp")
    monkeypatch.setattr(stage_module.os, "getuid", lambda: user_of_the_image())
    assert mounts[str(stage_module.device_lock_dir())] == "specbundle-leases"
    store = Path(deployments["build-docker"].parameters["store"])
    assert any(store.is_relative_to(place) for place in mounts)


def user_of_the_image() -> int:
    """The number of the user that its processes run as."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return int(next(line.removeprefix("USER ") for line in lines if line.startswith("USER ")))


def test_image_version_and_user_are_one_everywhere(
    raw: dict[str, Any], deployments: dict[str, DeploymentConfig]
) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in ("build-docker", "build-kubernetes"):
        assert pool_of(deployments[name]).job_variables["image"] == f"specbundle:{version}"
        assert deployments[name].pull == [{"prefect.deployments.steps.set_working_directory": {"directory": "/app"}}]
    template = template_of("specbundle-kubernetes")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert template["securityContext"]["runAsUser"] == user_of_the_image()
    assert template["securityContext"]["fsGroup"] == user_of_the_image()


def test_the_schedules_that_the_file_proposes_are_ones_that_prefect_takes(raw: dict[str, Any]) -> None:
    assert all("schedules" not in deployment for deployment in raw["deployments"]), "nothing is to run by itself"
    text = (ROOT / "prefect.yaml").read_text()
    scheduled = PrefectYamlModel.model_validate(yaml.safe_load(text.replace("# schedules:", "schedules:")))
    crons = {one.name: [entry.cron for entry in one.schedules] for one in scheduled.deployments if one.schedules}
    assert crons == {"build": ["0 1 * * *"], "run": ["0 9 * * 0"]}
    for cron in ("0 1 * * *", "0 9 * * 0"):
        # The same as the commands above them say.
        assert f'--cron "{cron}" --timezone UTC' in text
        assert CronSchedule(cron=cron, timezone="UTC")


def test_automations_are_ones_that_the_server_takes_and_no_key_is_misspelled() -> None:
    (automations,) = yaml.safe_load((ROOT / "pools/automations.yaml").read_text()).values()
    actions = {"call-webhook": CallWebhook, "change-flow-run-state": ChangeFlowRunState}
    for automation in automations:
        # Prefect ignores what it does not know.
        assert automation.keys() <= AutomationCore.model_fields.keys()
        assert automation["trigger"].keys() <= EventTrigger.model_fields.keys()
        for action in automation["actions"]:
            assert action.keys() <= actions[action["type"]].model_fields.keys()
        # By the server's own model, which also reads the templates.
        ServerAutomation.model_validate(AutomationCore.model_validate(automation).model_dump(mode="json"))
        assert automation["trigger"]["match_related"]["prefect.resource.id"] == "prefect.tag.specbundle"


def test_every_deployment_has_the_tag_that_automations_look_for(deployments: dict[str, DeploymentConfig]) -> None:
    assert all(deployment.tags == ["specbundle"] for deployment in deployments.values())
