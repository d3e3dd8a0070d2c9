"""Made-up drafts of one entry in a real registry, which all cost no training."""

from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from specforge_core.benchmark.compare import Standing
from specforge_core.benchmark.report import EntryReport, make_report
from specforge_core.facts import GateFailure, Measurement, Published
from tasks import registry, tracking
from tasks.registry import begin_rollback, finish_rollback, plan_rollback, promote, register, registered
from tasks.stage import EntryBuild
from tests import builds, made_build
from tests.made_build import measurement, prompts

TOO_SLOW = GateFailure(gate="min_speedup", suite="math", measured=1.1, required=1.5, message="speedup 1.10x, too slow")
FIGURES = measurement(prompts=prompts(10, 10, 10))


class Factory:
    """Builds of made-up drafts, in one store."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.artifacts = made_build.artifacts(store / "artifacts", made_build.result(FIGURES))

    def build(self, entry: str = "demo") -> EntryBuild:
        run = tracking.start_run(tracking.ENTRIES, entry, store=self.store, tags={})
        return builds.entry_build(self.store, tracking=run, name=entry)

    def report(
        self, build: EntryBuild, draft: str, *measurements: Measurement, failures: tuple[GateFailure, ...] = ()
    ) -> EntryReport:
        """The report of a build that made this draft, kept by its run."""
        result = made_build.result(*(measurements or (FIGURES,)))
        made = make_report(build.recipe.entry, build.recipe.target, self.artifacts, failures)
        export = made.lineage.stages["export"].model_copy(update={"content_id": draft})
        lineage = made.lineage.model_copy(update={"stages": made.lineage.stages | {"export": export}})
        made = made.model_copy(update={"lineage": lineage, "benchmark": result})
        build.tracking.log_text(f"{build.recipe.entry.name}.json", made.model_dump_json())
        return made

    def publish(self, draft: str, entry: str = "demo") -> registry.DraftVersion:
        """The version of a draft that was built, passed and published."""
        build = self.build(entry)
        version = register(build, self.report(build, draft))
        assert version is not None
        promote(build, version, published(draft))
        return registered(entry, store=self.store).versions[version.number - 1]

    def standing(self, draft: str, *measurements: Measurement, entry: str = "demo") -> Standing:
        """That of a new draft."""
        made = self.artifacts.benchmark.model_copy(
            update={"facts": made_build.result(*(measurements or (FIGURES,)))},
        )
        export = self.artifacts.draft.model_copy(update={"content_id": draft})
        return registry.standing(builds.entry_build(self.store, name=entry), export, made)

    def roll_back(self, to: int | None = None) -> int:
        """The champion after it."""
        rollback = plan_rollback("demo", to, store=self.store)
        begin_rollback(rollback, store=self.store)
        finish_rollback(rollback, published(rollback.to.draft), store=self.store)
        return self.champion()

    def champion(self) -> int:
        champion = registered("demo", store=self.store).champion
        assert champion is not None
        return champion.number

    def aliases(self) -> dict[str, int]:
        """The version of each."""
        aliases = self.client.get_registered_model("specbundle.demo").aliases
        return {name: int(number) for name, number in aliases.items()}

    def statuses(self) -> list[str]:
        return [version.status for version in registered("demo", store=self.store).versions]

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking.tracking_uri(self.store))

    def stored(self, number: int) -> ModelVersion:
        """As MLflow has it."""
        return self.client.get_model_version("specbundle.demo", str(number))


def published(draft: str) -> Published:
    return Published(
        path=Path("/published/demo"),
        content_id=f"files of {draft}",
        changed=True,
        repository="org/demo",
        revision="abc",
    )
