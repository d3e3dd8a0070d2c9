"""What SECURITY.md promises: no code out of repositories, servers on loopback alone, names that stay where they belong.

Where a promise belongs to one part it is held beside that part's other tests: mirrors in `test_mirror.py`, checkpoints
in `training/test_checkpoint.py`, published folders in `hub/test_repository.py`, targets in `targets/`.
"""

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors import SafetensorError

from flows import services
from specforge_core.benchmark import server as server_module
from specforge_core.benchmark.stage_servers import stage_servers
from specforge_core.data.chat_template import load_tokenizer
from specforge_core.data.prompts import load_prompts
from specforge_core.data.shards import Shard, ShardRecord
from specforge_core.decoding.eagle3_drafter import load_eagle3_drafter
from specforge_core.hub.repository import publish_directory
from specforge_core.manifest import Manifest
from specforge_core.manifest_errors import ManifestError
from specforge_core.manifest_sections import PromptSource
from specforge_core.stages import ResolvedTarget, ServedEngine
from specforge_core.targets.hf import HFTarget
from specforge_core.targets.weights import TargetFiles
from tasks import tracking
from tests import tiny
from tests.factory import make_factory, tiny_entry
from tests.pickle_bomb import plant
from tests.sglang_like import MODULE

ROOT = Path(__file__).parents[1]
SOURCES = sorted(file for package in ("flows", "tasks", "specforge_core") for file in (ROOT / package).rglob("*.py"))
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# To read DCP's index with an unpickler that knows DCP's own records alone.
ALLOWED_TO_PICKLE = {"specforge_core/training/checkpoint.py"}
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def calls_in(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call, with the dotted name of what is called."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    """The text of a keyword's value."""
    return next((ast.unparse(argument.value) for argument in call.keywords if argument.arg == name), None)


def test_no_module_can_read_a_pickle() -> None:
    assert len(SOURCES) > 100
    for file in SOURCES:
        name = file.relative_to(ROOT).as_posix()
        imported = {
            word
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for word in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert not imported & PICKLING or name in ALLOWED_TO_PICKLE, f"{name} imports {imported & PICKLING}"
        for called, call in calls_in(file):
            where = f"{name}:{call.lineno}: {ast.unparse(call)}"
            assert called != "torch.load" or keyword(call, "weights_only") == "True", where
            assert keyword(call, "allow_pickle") in (None, "False"), where
            assert not re.search(r"(^|\.)(read_pickle|load_from_disk|load_model|unpickle)$", called), where
            assert called not in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"), where
            assert keyword(call, "shell") in (None, "False"), where


def test_models_come_from_safetensors_and_their_code_from_the_entry_alone() -> None:
    seen = set()
    for file in SOURCES:
        for called, call in calls_in(file):
            owner, _, method = called.rpartition(".")
            if method not in ("from_pretrained", "from_config"):
                continue
            where = f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
            seen.add(owner)
            if "ForCausalLM" in owner and method == "from_pretrained":
                assert keyword(call, "use_safetensors") == "True", where
            trust = keyword(call, "trust_remote_code")
            # `**origin` holds the entry's own answer; left out, transformers asks whoever sits at the terminal.
            is_said = trust is not None or any(argument.arg is None for argument in call.keywords)
            if owner.startswith("Auto") and not ast.unparse(call).startswith(
                "AutoModelForCausalLM.from_config(config)"
            ):
                assert is_said, where
            assert trust in (None, "False", "trust", "target.trust_remote_code"), where
    assert {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"} <= seen


def test_a_pickle_where_weights_or_features_should_be_does_not_run(tmp_path: Path, tiny_target: ResolvedTarget) -> None:
    mark = tmp_path / "ran"
    draft = tmp_path / "draft"
    plant(draft / "pytorch_model.bin", mark)
    (draft / "config.json").write_text("{}")
    target = HFTarget(tiny_target, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_eagle3_drafter(draft, target)
    plant(draft / "model.safetensors", mark)
    with pytest.raises(SafetensorError):
        load_eagle3_drafter(draft, target)
    plant(tmp_path / "features/shard-00000.safetensors", mark)
    with pytest.raises(SafetensorError):
        Shard(tmp_path / "features/shard-00000.safetensors")
    shutil.copytree(tiny_target.model, tmp_path / "target")
    plant(tmp_path / "target/model.safetensors", mark)
    with pytest.raises(SafetensorError):
        HFTarget(tiny.resolved(tmp_path / "target"), device="cpu")
    assert not mark.exists()


def test_code_of_a_target_runs_only_if_its_entry_says_so(
    tmp_path: Path, tiny_target: ResolvedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "target", tmp_path / "ran"
    shutil.copytree(tiny_target.model, folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "of-its-own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "configuration_own.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig\nPath({str(mark)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'of-its-own'\n"
    )
    target = tiny.resolved(folder)
    assert not target.trust_remote_code
    for load in (TargetFiles, lambda target: HFTarget(target, device="cpu")):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load(target)
    # It is one that the library knows.
    load_tokenizer(target)
    assert not mark.exists()
    # The model of this config is not known, but by then its code has run.
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        TargetFiles(target.model_copy(update={"trust_remote_code": True}))
    assert mark.exists()


def test_the_script_of_a_data_set_does_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "prompts.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        list(load_prompts(PromptSource(dataset=str(folder))))
    assert not (tmp_path / "ran").exists()


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Address and port of every socket that the process or a descendant listens at."""
    found = set()
    for one in (process, *process.children(recursive=True)):
        try:
            found |= {(at.laddr.ip, at.laddr.port) for at in one.net_connections("inet") if at.status == "LISTEN"}
        except psutil.NoSuchProcess:
            continue
    return found


def test_no_source_names_an_address_of_every_interface() -> None:
    files = [*SOURCES, ROOT / "Makefile", ROOT / "Dockerfile", ROOT / "prefect.yaml", *(ROOT / "pools").iterdir()]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"0\.0\.0\.0|[\"']::[\"']|INADDR_ANY|--allowed-hosts", text), file


def test_a_server_of_a_stage_listens_on_loopback_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SGLANG_MODULE", MODULE)
    before = listening(psutil.Process())
    with stage_servers(ServedEngine(), {"--model-path": "scripted"}, name="target", directory=tmp_path) as (server,):
        opened = listening(psutil.Process()) - before
    assert server.url in {f"http://{ip}:{port}" for ip, port in opened}
    assert {ip for ip, _ in opened} <= LOOPBACK


def test_servers_of_a_build_are_told_to_listen_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real ones are asked in `flows/test_deployment.py`.
    commands: list[list[str]] = []
    monkeypatch.setattr(services, "SupervisedProcess", lambda name, command, **options: commands.append(command))
    services.prefect_server(1, log=tmp_path / "log", env={})
    commands.append(tracking.server_command("sqlite:///mlflow.db"))
    for command in commands:
        assert command[command.index("--host") + 1] == "127.0.0.1"
    assert len(commands) == 2


BROKEN_NAMES = ("..", ".", "", "../up", "/etc/cron.d/x", "a/b", "a\\b", ".hidden", "UPPER", "a\0b", "a" * 65)


@pytest.mark.parametrize("name", BROKEN_NAMES)
def test_names_of_entries_and_suites_name_one_folder(tmp_path: Path, name: str) -> None:
    suite = tiny_entry()
    suite["benchmark"] = {"suites": [{"name": name, "source": {"dataset": "test.jsonl"}}]}
    for entry in (tiny_entry(name), suite):
        with pytest.raises(ManifestError, match="it names folders"):
            Manifest.load(make_factory(tmp_path, entry))


@pytest.mark.parametrize("directory", ["..", "../up", "published/../../up"])
def test_drafts_are_not_published_above_the_store(tmp_path: Path, directory: str) -> None:
    with pytest.raises(ManifestError, match="leaves the store"):
        Manifest.load(make_factory(tmp_path, tiny_entry() | {"publish": {"directory": directory}}))


def test_a_link_in_the_place_of_a_published_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("kept")
    (tmp_path / "published").mkdir()
    (tmp_path / "published/demo").symlink_to(elsewhere)
    published = publish_directory(tmp_path / "published", "demo", {"config.json": b"{}"})
    assert [file.name for file in published.path.iterdir()] == ["config.json"]
    assert [(file.name, file.read_text()) for file in elsewhere.iterdir()] == [("mine", "kept")]


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "shard-00000.safetensors/..", "shard-1.bin"])
def test_an_index_of_features_opens_its_own_shards_alone(name: str) -> None:
    counts = {"size_bytes": 1, "num_documents": 1, "num_tokens": 1, "num_loss_tokens": 1}
    with pytest.raises(ValueError, match="String should match pattern"):
        ShardRecord(name=name, sha256="", **counts)


def workflow(name: str) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((ROOT / ".github/workflows" / name).read_text())
    return loaded


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / ".github/workflows").iterdir())])
def test_workflows_can_read_the_repository_and_nothing_else(name: str) -> None:
    text, loaded = (ROOT / ".github/workflows" / name).read_text(), workflow(name)
    assert loaded["permissions"] == {"contents": "read"}
    # YAML reads the key `on` as a boolean.
    assert "pull_request_target" not in loaded[True]
    assert "secrets." not in text
    for job in loaded["jobs"].values():
        assert "timeout-minutes" in job
        assert "permissions" not in job
        for step in job["steps"]:
            if "actions/checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
    for action in re.findall(r"uses: (.*)", text):
        # A tag can be moved; the comment says which one it was.
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", action), action
    # What others write, such as a branch's name, must not become a command.
    assert not re.findall(r"run:.*\$\{\{\s*github\.", text)


def test_ci_makes_what_the_local_run_makes_and_audits_every_tested_version() -> None:
    targets = [leg["target"] for leg in workflow("ci.yml")["jobs"]["make"]["strategy"]["matrix"]["include"]]
    assert targets == re.findall(r"^make ([a-z-]+)", (ROOT / ".ci/run").read_text(), re.M)
    audit = workflow("audit.yml")
    assert "schedule" in audit[True]
    kinds = audit["jobs"]["audit"]["strategy"]["matrix"]["kind"]
    assert {f"{kind}.txt" for kind in kinds} == {path.name for path in (ROOT / "constraints").iterdir()}
    for path in (ROOT / "constraints").iterdir():
        pinned = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        # pip-audit asks about exact versions; anything else would be left out.
        assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+( ?;.*)?", line) for line in pinned), path.name
