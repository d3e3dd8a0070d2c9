"""What the study of float8 records, as JSON and as markdown. Torch-free."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from specforge_core.artifacts import write_result
from specforge_core.benchmark.tables import markdown_table, processor
from specforge_core.facts import Conversations, Environment, Record
from specforge_core.manifest_sections import DraftConfig, FeatureDtype, TrainingConfig

NAME = "float8"
MIB = 2**20


class Outcome(Record):
    """One trained draft, on held-out conversations; positions are draft positions, the first one first."""

    features: FeatureDtype
    """That it was trained on."""
    float8_matmuls: bool
    seed: int
    acceptance_length: float
    acceptance: tuple[float, ...]
    """Expected acceptance probability, by position."""
    accuracy: tuple[float, ...]
    """Greedy matches with the target, by position."""
    num_steps: int
    training_s: float


class StudiedTarget(Record):
    """The model that the drafts are for."""

    name: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    origin: str
    """How it was made, in words."""


class StudyRun(Record):
    """All drafts for one target, trained on one machine."""

    environment: Environment
    target: StudiedTarget
    conversations: Conversations
    num_held_out: int
    """Conversations that no draft is trained on."""
    feature_bytes: dict[FeatureDtype, int]
    draft: DraftConfig
    training: TrainingConfig
    """Of the first seed, in bfloat16."""
    outcomes: tuple[Outcome, ...] = ()

    @property
    def hardware(self) -> str:
        """What the drafts were trained on."""
        return self.environment.gpu or self.environment.cpu


class Float8Study(Record):
    """Runs for several targets, or of one target on several machines."""

    runs: tuple[StudyRun, ...] = ()

    def plus(self, run: StudyRun) -> "Float8Study":
        """The study with this run, in place of an earlier one for the same target on the same hardware."""
        others = [old for old in self.runs if (old.target.name, old.hardware) != (run.target.name, run.hardware)]
        return Float8Study(runs=(*others, run))


def load_study(path: Path) -> Float8Study:
    """The study in a JSON file; an empty one if there is none."""
    return Float8Study.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else Float8Study()


def write_study(study: Float8Study, directory: Path) -> None:
    """`float8.json` and `float8.md`."""
    write_result(directory, NAME, study, markdown(study))


def markdown(study: Float8Study) -> str:
    """The study for people."""
    sections = ["# What float8 does to acceptance", EXPLANATION]
    for run in study.runs:
        sections += _sections(run)
    return "\n\n".join(sections) + "\n"


EXPLANATION = """\
Drafts that differ in float8 alone: the same conversations, and for each seed the same initial weights and batches.
`float8` features are hidden states stored with a scale for each vector; `float8` products are
`training.float8_matmuls`. Every draft is judged as it is served: with features in bfloat16 and no product in float8.
Acceptance length is that of a chain of 3 in a speculative loop over held-out answers of the target. Means over seeds,
with the lowest and the highest; the difference is to the draft of the same seed without float8."""


def _sections(run: StudyRun) -> list[str]:
    target, training, made_on = run.target, run.training, run.environment
    where = f"{made_on.gpu}; {processor(made_on)}" if made_on.gpu else processor(made_on)
    sizes = ", ".join(f"{size / MIB:,.0f} MiB in {dtype}" for dtype, size in run.feature_bytes.items())
    return [
        f"## {target.name}: {target.num_parameters / 1e6:,.1f} M parameters",
        f"{target.num_layers} layers, {target.hidden_size} wide; {target.origin}. It answered "
        f"{run.conversations.num_conversations:,} prompts ({run.conversations.num_loss_tokens:,} tokens; "
        f"{run.conversations.num_cut_off:,} answers cut off), of which {run.num_held_out:,} are held out. Features "
        f"take {sizes}. A draft sees the others {training.num_epochs} times, "
        f"{training.tokens_per_batch:,} tokens a step, with {run.draft.num_steps} steps of training-time test.",
        markdown_table(_rows(run)),
        f"{where}; {made_on.packages}; commit {made_on.commit}; `{made_on.command}`.",
    ]


def _rows(run: StudyRun) -> list[dict[str, str]]:
    kinds = list(dict.fromkeys((outcome.features, outcome.float8_matmuls) for outcome in run.outcomes))
    exact = {
        outcome.seed: outcome for outcome in run.outcomes if (outcome.features, outcome.float8_matmuls) == kinds[0]
    }
    rows = []
    for features, float8_matmuls in kinds:
        outcomes = [o for o in run.outcomes if (o.features, o.float8_matmuls) == (features, float8_matmuls)]
        differences = [o.acceptance_length - exact[o.seed].acceptance_length for o in outcomes if o.seed in exact]
        is_exact = (features, float8_matmuls) == kinds[0]
        rows.append(
            {
                "features": features,
                "products": "float8" if float8_matmuls else "-",
                "seeds": str(len(outcomes)),
                "acceptance length": _spread([o.acceptance_length for o in outcomes], "{:.3f}"),
                "difference": "-" if is_exact else _spread(differences, "{:+.3f}"),
                "expected acceptance by position": _by_position(outcomes, lambda o: o.acceptance),
                "greedy matches by position": _by_position(outcomes, lambda o: o.accuracy),
                "s of training": _spread([o.training_s for o in outcomes], "{:.1f}"),
            }
        )
    return rows


def _spread(values: Sequence[float], form: str) -> str:
    """Mean, lowest and highest."""
    low, middle, high = (form.format(value) for value in (min(values), mean(values), max(values)))
    return f"{middle} ({low} to {high})"


def _by_position(outcomes: Sequence[Outcome], shares: Callable[[Outcome], tuple[float, ...]]) -> str:
    by_position = zip(*(shares(outcome) for outcome in outcomes), strict=True)
    return ", ".join(f"{mean(values):.1%}" for values in by_position)
