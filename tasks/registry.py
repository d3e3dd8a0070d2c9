"""The registry of drafts, in MLflow: every version of an entry, and which of them users are to take.

Registered model `specbundle.<entry>`, a version for each distinct draft, told apart by the content id of its export.
A build that makes the same draft again measures that version again. Its tags hold every digest and figure; the run that
measured it last holds the whole report. A version is

    candidate    it passed its gates and is not published yet; the newest has the alias of this name
    published    it was; the alias `champion` is on the one that users get
    rejected     it failed a gate
    rolled-back  it was published, and then an older one was put back: no build publishes it again, `rollback --to` does

The alias moves last, so a kill before leaves the old champion, and doing the same again completes what is missing.
"""

import contextlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from specforge_core.artifacts import Artifact
from specforge_core.benchmark.compare import Measured, Standing, baseline_speeds, compare
from specforge_core.benchmark.report import EntryReport, load_report
from specforge_core.facts import BenchmarkResult, Published, Record, ServingDraft
from tasks.comparison import SHOWN_TAG, result_metrics
from tasks.stage import EntryBuild, run_logger
from tasks.tracking import mlflow_client, never_fails, tracking_uri, tracking_works, without_passwords

Status = Literal["candidate", "published", "rejected", "rolled-back"]

MODEL_PREFIX = "specbundle."
OURS = f"name LIKE '{MODEL_PREFIX}%'"
"""As MLflow is asked for them."""
CHAMPION, CANDIDATE = "champion", "candidate"
DRAFT_TAG, SETTING_TAG = "export.content_id", "setting"
BASELINE_PREFIX = "baseline/"
MAX_MODELS = 1000
"""MLflow's limit of one request."""
MAX_REASON_CHARACTERS = 160
COLORS = "#4e79a7 #f28e2b #59a14f #e15759 #76b7b2 #b07aa1 #9c755f #edc948 #ff9da7 #bab0ac".split()
"""Tableau's ten."""
DESCRIPTION = "Drafts of one entry; `champion` is what users get. A version's run has its report."


class DraftVersion(Record):
    """One draft of an entry."""

    entry: str
    number: int
    status: Status
    draft: str
    """Content id of the exported draft."""
    run_id: str
    """The run that measured it last, which has its report."""
    promoted_at: datetime | None = None
    """When it became the champion; None if it never did."""
    content_id: str | None = None
    """Of the published repository's files, as the three below None if it was never published there."""
    repository: str | None = None
    revision: str | None = None
    url: str | None = None


class Registered(NamedTuple):
    """All drafts of an entry."""

    versions: tuple[DraftVersion, ...] = ()
    """Oldest first."""
    champion: DraftVersion | None = None

    def of_draft(self, content_id: str) -> DraftVersion | None:
        """The version of an exported draft."""
        return next((version for version in self.versions if version.draft == content_id), None)


def registered(entry: str, *, store: Path) -> Registered:
    """What the registry has of an entry. Raises: MlflowException if it cannot be asked."""
    client, name = _client(store), MODEL_PREFIX + entry
    try:
        champion = client.get_registered_model(name).aliases.get(CHAMPION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return Registered()
    # One that was made by hand is not ours.
    found = [_version(one) for one in client.search_model_versions(f"name = '{name}'") if DRAFT_TAG in one.tags]
    versions = sorted(found, key=lambda one: one.number)
    return Registered(tuple(versions), next((one for one in versions if str(one.number) == str(champion)), None))


def champions(store: Path) -> dict[str, DraftVersion]:
    """The champion of every entry that has one; none of them, with a warning, if the registry cannot be asked."""
    found: dict[str, DraftVersion] = {}
    with never_fails(tracking_uri(store)):
        for model in _client(store).search_registered_models(OURS, max_results=MAX_MODELS):
            if champion := registered(model.name.removeprefix(MODEL_PREFIX), store=store).champion:
                found[champion.entry] = champion
    return found


def report_of(version: DraftVersion, *, store: Path) -> EntryReport:
    """The report of the version's last build. Raises: MlflowException, OSError, ValueError if it cannot be read."""
    with TemporaryDirectory() as folder:
        path = _client(store).download_artifacts(version.run_id, f"{version.entry}.json", folder)
        return load_report(Path(path))


@contextlib.contextmanager
def must_answer(store: Path) -> Iterator[None]:
    """Around what has no use without a registry: one that cannot be asked becomes a ConnectionError that says so."""
    try:
        yield
    except MlflowException as error:
        raise ConnectionError(_unanswered(store, error)) from None


def _unanswered(store: Path, error: Exception) -> str:
    reason = textwrap.shorten(without_passwords(str(error)), MAX_REASON_CHARACTERS, placeholder="...")
    return f"the registry at {without_passwords(tracking_uri(store))} cannot be asked ({reason})"


def standing(build: EntryBuild, draft: Artifact[ServingDraft], benchmark: Artifact[BenchmarkResult]) -> Standing:
    """What a new draft is held against. A registry that cannot be asked is part of the answer."""
    try:
        found = _standing(build, draft.content_id, benchmark.facts)
    except (MlflowException, OSError, ValueError) as error:
        reason = _unanswered(build.store, error)
        run_logger().warning("%s", reason)
        return Standing(unknown=reason)
    # It answers, so what follows is tracked again, whatever failed on the way.
    tracking_works(tracking_uri(build.store))
    return found


def _standing(build: EntryBuild, draft: str, result: BenchmarkResult) -> Standing:
    entry, store = build.recipe.entry, build.store
    new, known = Measured(result, entry.engine), registered(entry.name, store=store)
    setting = str(new.setting())
    speeds = _usual_speeds(build, setting, draft)
    itself, champion = known.of_draft(draft), known.champion
    if itself and itself.status == "rolled-back":
        return Standing(usual_speeds=speeds, setting=setting, rolled_back=itself.number)
    if champion is None or champion.draft == draft:
        return Standing(usual_speeds=speeds, setting=setting)
    report = report_of(champion, store=store)
    before = Measured(report.benchmark, report.lineage.entry.engine)
    comparison = compare(new, before, version=champion.number)
    return Standing(comparison=comparison, usual_speeds=speeds, setting=setting)


def _usual_speeds(build: EntryBuild, setting: str, draft: str) -> dict[str, float]:
    """Of other drafts for the same target, whatever their entry."""
    target = build.recipe.target.content_id
    speeds: dict[str, list[float]] = {}
    for version in _client(build.store).search_model_versions(f"tags.`target.content_id` = '{target}'"):
        if version.tags.get(DRAFT_TAG) == draft or version.tags.get(SETTING_TAG) != setting:
            continue
        for tag, value in version.tags.items():
            if tag.startswith(BASELINE_PREFIX):
                speeds.setdefault(tag.removeprefix(BASELINE_PREFIX), []).append(float(value))
    return {name: median(values) for name, values in speeds.items()}


def register(build: EntryBuild, report: EntryReport) -> DraftVersion | None:
    """The version of a draft that was measured, with the outcome of its gates; None, with a warning, if the registry
    cannot be asked."""
    run, entry = build.tracking, report.lineage.entry.name
    # A version whose report was not kept would be a champion that nothing can be held against.
    if run.run_id is None or not run.is_tracked:
        return None
    with never_fails(run.uri):
        client, name, known = mlflow_client(run.uri), MODEL_PREFIX + entry, registered(entry, store=build.store)
        draft = report.lineage.stages["export"].content_id
        before = known.of_draft(draft)
        tags = version_tags(report) | {"run_id": run.run_id}
        if before is None or before.status in ("candidate", "rejected"):
            tags["status"] = "rejected" if report.failures else "candidate"
        if before is None:
            _ensure_model(client, name)
            tags["color"] = COLORS[len(client.search_model_versions(OURS)) % len(COLORS)]
            made = client.create_model_version(name, f"runs:/{run.run_id}/{entry}.json", run.run_id, tags=tags)
            number = int(made.version)
        else:
            number = before.number
            _set_tags(client, name, number, tags)
            _remove_figures(client, name, number, keep=tags)
            if before.run_id != run.run_id:
                # The chart of all drafts shows each of them once.
                client.set_tag(before.run_id, SHOWN_TAG, "false")
        client.update_model_version(name, str(number), "\n\n".join(f.message for f in report.failures) or "passed")
        # As the comparison page tells drafts apart: it would give two runs one colour.
        client.update_run(run.run_id, name=f"{entry} v{number}{' (rejected)' if report.failures else ''}")
        color = client.get_model_version(name, str(number)).tags.get("color", COLORS[number % len(COLORS)])
        client.set_tag(run.run_id, "mlflow.runColor", color)
        if not report.failures and (known.champion is None or known.champion.number != number):
            client.set_registered_model_alias(name, CANDIDATE, str(number))
        return registered(entry, store=build.store).of_draft(draft)
    return None


def promote(build: EntryBuild, version: DraftVersion | None, published: Published) -> None:
    """Make a version that was just published the champion. Without a registry its champion stays what it was."""
    if version is None:
        run_logger().warning(
            "%s is published, but no registry knows of it; build it again once the tracking server answers",
            build.recipe.entry.name,
        )
        return
    with never_fails(build.tracking.uri):
        known = registered(version.entry, store=build.store)
        is_champion = known.champion is not None and known.champion.number == version.number
        _set_published(version, published, store=build.store, promoted_at=None if is_champion else datetime.now(UTC))


def _set_published(version: DraftVersion, published: Published, *, store: Path, promoted_at: datetime | None) -> None:
    """Note where a version lies, and move the alias to it. Args: promoted_at: None leaves it."""
    client, name = _client(store), MODEL_PREFIX + version.entry
    tags = {
        "status": "published",
        "content_id": published.content_id,
        "repository": published.repository,
        "revision": published.revision,
        "url": published.url,
        "promoted_at": promoted_at.isoformat() if promoted_at else None,
    }
    _set_tags(client, name, version.number, {tag: value for tag, value in tags.items() if value is not None})
    client.set_registered_model_alias(name, CHAMPION, str(version.number))
    # A database gives numbers, a server texts.
    if str(client.get_registered_model(name).aliases.get(CANDIDATE)) == str(version.number):
        client.delete_registered_model_alias(name, CANDIDATE)


class Rollback(NamedTuple):
    """From which version to which."""

    left: DraftVersion
    to: DraftVersion
    undone: tuple[DraftVersion, ...]
    """Those that were promoted after `to`, which no build is to publish again."""


def plan_rollback(entry: str, number: int | None, *, store: Path) -> Rollback:
    """What a rollback means now: to that version, else to the one that was champion before.

    Raises: ValueError if there is none; MlflowException if the registry cannot be asked.
    """
    versions, champion = registered(entry, store=store)
    if champion is None:
        raise ValueError(
            f"{entry} has no champion in {without_passwords(tracking_uri(store))}, so there is nothing to go back from"
        )
    promoted = {version.number: version for version in versions if version.promoted_at}
    if number is None:
        older = [one for one in promoted.values() if one.status == "published" and _is_after(champion, one)]
        if not older:
            raise ValueError(f"{entry} has nothing to go back to: {_listed(versions, champion)}")
        to = max(older, key=_promoted_at)
    elif number not in promoted:
        raise ValueError(f"{entry} has no version {number} that was published: {_listed(versions, champion)}")
    else:
        to = promoted[number]
    if to == champion and champion.status == "published":
        raise ValueError(f"version {number} of {entry} is the champion already")
    undone = tuple(one for one in promoted.values() if one.status == "published" and _is_after(one, to))
    return Rollback(champion, to, undone)


def begin_rollback(rollback: Rollback, *, store: Path) -> None:
    """Note that builds must not publish what is left. First, so that a build in between cannot."""
    client, name = _client(store), MODEL_PREFIX + rollback.to.entry
    for version in rollback.undone:
        client.set_model_version_tag(name, str(version.number), "status", "rolled-back")


def finish_rollback(rollback: Rollback, published: Published, *, store: Path) -> None:
    """Make the older version, which is published again, the champion."""
    _set_published(rollback.to, published, store=store, promoted_at=None)


def _client(store: Path) -> MlflowClient:
    return mlflow_client(tracking_uri(store))


def _ensure_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name, description=DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _promoted_at(version: DraftVersion) -> datetime:
    assert version.promoted_at is not None
    return version.promoted_at


def _is_after(one: DraftVersion, other: DraftVersion) -> bool:
    return _promoted_at(one) > _promoted_at(other)


def _listed(versions: Sequence[DraftVersion], champion: DraftVersion) -> str:
    return ", ".join(f"{one.number} {'champion' if one == champion else one.status}" for one in versions)


def version_tags(report: EntryReport) -> dict[str, str]:
    """Every digest and figure of a draft."""
    lineage, result = report.lineage, report.benchmark
    setting = Measured(result, lineage.entry.engine).setting()
    figures = {
        **result_metrics(result),
        **{BASELINE_PREFIX + name: speed for name, speed in baseline_speeds(result).items()},
        "eval/acceptance_length": report.checkpoint.eval_acceptance_length,
        "eval/loss": report.checkpoint.eval_loss,
        "vocabulary/coverage": report.vocabulary.coverage,
    }
    return {
        "target": lineage.entry.target.model,
        "target.content_id": lineage.target_content_id,
        "method": lineage.entry.draft.algorithm,
        SETTING_TAG: str(setting),
        "commit": lineage.commit or "unknown",
        **{f"{name}.key": stage.key for name, stage in lineage.stages.items()},
        **{f"{name}.content_id": stage.content_id for name, stage in lineage.stages.items()},
        **{name: f"{value:.6g}" for name, value in figures.items()},
        "failed_gates": ", ".join(dict.fromkeys(failure.gate for failure in report.failures)) or "none",
    }


def _version(found: ModelVersion) -> DraftVersion:
    tags = found.tags
    return DraftVersion(
        entry=found.name.removeprefix(MODEL_PREFIX),
        number=int(found.version),
        status=tags["status"],
        draft=tags[DRAFT_TAG],
        run_id=tags["run_id"],
        promoted_at=tags.get("promoted_at"),
        **{name: tags.get(name) for name in ("content_id", "repository", "revision", "url")},
    )


def _set_tags(client: MlflowClient, name: str, number: int, tags: Mapping[str, str]) -> None:
    before = client.get_model_version(name, str(number)).tags
    for tag, value in tags.items():
        if before.get(tag) != value:
            client.set_model_version_tag(name, str(number), tag, value)


def _remove_figures(client: MlflowClient, name: str, number: int, *, keep: Mapping[str, str]) -> None:
    """Of suites that are no longer measured."""
    for tag in client.get_model_version(name, str(number)).tags:
        if "/" in tag and tag not in keep:
            client.delete_model_version_tag(name, str(number), tag)
