"""The cost of an entry, put together. Torch-free."""

import json
import shutil
from pathlib import Path

from specforge_core.artifacts import Store
from specforge_core.cost.configs import ConfigReader
from specforge_core.cost.draft_model import num_parameters
from specforge_core.cost.estimate import STAGES, EntryCost, StageCost
from specforge_core.cost.fit import problems
from specforge_core.cost.hardware import find_hardware
from specforge_core.cost.job import Job, make_job
from specforge_core.cost.rates import load_rates
from specforge_core.cost.target_model import target_model
from specforge_core.draft_limits import check_draft
from specforge_core.manifest import ManifestEntry


class CostPlanner:
    """Costs of entries on one kind of GPU."""

    def __init__(
        self,
        *,
        base_dir: Path,
        store: Store | None,
        reports: Path,
        hardware: str | None = None,
        tokens_per_conversation: tuple[int, int] | None = None,
        disk_bytes_per_s: float | None = None,
    ) -> None:
        """Args: base_dir: the manifest's folder; reports: where measured rates are; hardware: name of the GPU, that of
        the measurements when absent; tokens_per_conversation: of prompt and answer, where the user knows them;
        disk_bytes_per_s: of each host, written and read, that of the measurements when absent.

        Raises: ValueError for hardware without figures, or a folder without rates.
        """
        wanted = find_hardware(hardware) if hardware else None
        self.rates = load_rates(reports, wanted)
        self.hardware = wanted or self.rates.hardware
        if disk_bytes_per_s:
            self.rates = self.rates._replace(read_bytes_per_s=disk_bytes_per_s, write_bytes_per_s=disk_bytes_per_s)
        self._configs = ConfigReader(base_dir)
        self._store, self._reports, self._tokens = store, reports, tokens_per_conversation

    def job(self, entry: ManifestEntry) -> Job:
        """What the cost is counted from. Raises: as `make_job`."""
        return make_job(
            entry,
            configs=self._configs,
            store=self._store,
            rates=self.rates,
            hardware=self.hardware,
            tokens_per_conversation=self._tokens,
        )

    def cost(self, entry: ManifestEntry) -> EntryCost:
        """The cost of a build from its first stage on. Raises: ValueError if what it depends on is not known."""
        if entry.resources.num_gpus == 0:
            return cpu_cost(entry, self._configs, self._reports)
        return gpu_cost(self.job(entry), self._free_disk_bytes())

    def _free_disk_bytes(self) -> float | None:
        if self._store is None:
            return None
        root = self._store.root
        return shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free


def gpu_cost(job: Job, free_disk_bytes: float | None) -> EntryCost:
    """What a build of the entry takes on GPUs, from its first stage on."""
    entry, model = job.entry, job.server.model
    return EntryCost(
        entry=entry.name,
        target=entry.target.model,
        hardware=job.server.hardware.name,
        num_gpus=job.num_gpus,
        weight_bytes=model.weight_bytes,
        num_parameters=model.num_parameters,
        num_active_parameters=model.num_active_parameters,
        num_draft_parameters=num_parameters(job.draft),
        num_conversations=job.conversations.num_conversations,
        stages=tuple(stage(job) for stage in STAGES),
        assumptions=assumptions(job),
        problems=problems(job, free_disk_bytes),
    )


def assumptions(job: Job) -> tuple[str, ...]:
    """What the numbers rest on, in words."""
    conversations = job.conversations
    lines = [
        f"target: {job.config_source}",
        f"{conversations.num_conversations:,} conversations of {conversations.tokens_each:,.0f} tokens, "
        f"{conversations.answer_tokens_each:,.0f} of them answers: {conversations.source}",
    ]
    if job.server.hardware != job.rates.hardware:
        lines.append(
            f"{job.server.hardware.name}: by the rates of {job.rates.hardware.name}, scaled by the data sheets' FLOP/s "
            "and bytes/s"
        )
    if job.server.model.expert_width:
        lines.append("experts: read and multiplied at the rates of a dense target, which is what was measured")
    lines.append("benchmark: rounds with a draft are taken to last as long as those without")
    return tuple(lines)


def cpu_cost(entry: ManifestEntry, configs: ConfigReader, reports: Path) -> EntryCost:
    """A build on a CPU takes what it was measured to take. Raises: ValueError if nothing was, or as `make_job`."""
    found = configs.read(entry.target)
    check_draft(entry.draft, found.values)
    path = reports / "factory" / f"{entry.name}.json"
    if not path.is_file():
        raise ValueError(
            f"{entry.name} is built on a CPU, and only what was measured is known of that: there is no {path}; "
            "`python -m flows.measure` makes it"
        )
    measured = json.loads(path.read_text(encoding="utf-8"))
    last, environment = measured["fresh"][-1], measured["environment"]
    model = target_model(found.values, entry.target)
    return EntryCost(
        entry=entry.name,
        target=entry.target.model,
        hardware=environment["cpu"],
        num_gpus=0,
        weight_bytes=model.weight_bytes,
        num_parameters=model.num_parameters,
        num_active_parameters=model.num_active_parameters,
        num_draft_parameters=0,
        num_conversations=0,
        stages=tuple(
            StageCost(stage=stage, num_tokens=0, disk_bytes=0, num_gpus=0, wall_s=seconds, peak_bytes_per_gpu=0)
            for stage, seconds in last["stages_s"].items()
        ),
        assumptions=(
            f"measured on {environment['num_threads']} cores of {environment['cpu']} at commit "
            f"{environment['commit'][:7]}",
        ),
    )
