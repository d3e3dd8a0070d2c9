"""A finished build whose numbers are made up, for tests of what is made from them."""

from pathlib import Path
from typing import Any

from specforge_core.artifacts import BuildArtifacts, seal
from specforge_core.facts import (
    BenchmarkResult,
    Conversations,
    DraftCheckpoint,
    Environment,
    HiddenStates,
    Lossless,
    Measurement,
    PromptSums,
    ServerRecord,
    ServingDraft,
    SweepPoint,
    Vocabulary,
)
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_gates import GatesConfig
from specforge_core.manifest_publish import PublishConfig
from specforge_core.manifest_sections import (
    BenchmarkConfig,
    DataConfig,
    PromptSource,
    ServingConfig,
    SuiteConfig,
    TargetConfig,
)
from specforge_core.stages import ResolvedTarget

REVISION = "0e9e39f249a16976918f6564b8830bc894c89659"
TARGET = ResolvedTarget(model="meta-llama/Llama-3.1-8B-Instruct", revision=REVISION, content_id=REVISION)


def measurement(suite: str = "math", **changes: Any) -> Measurement:
    """300 tokens in 100 steps: acceptance length 3.0; 90, 70 and 40 of 100 steps accepted positions 1, 2 and 3."""
    values: dict[str, Any] = {
        "suite": suite,
        "serving": ServingConfig(),
        "num_prompts": 10,
        "num_output_tokens": 300,
        "num_verify_steps": 100,
        "accepted_by_position": (90, 70, 40),
        "ngram_acceptance_length": 1.25,
        "baseline_output_tokens_per_s": (100.0, 104.0, 102.0),
        "output_tokens_per_s": (204.0, 200.0, 214.0),
        "speedup": 2.0,
        "speedup_low": 1.9,
        "speedup_high": 2.1,
        "lossless": Lossless(num_identical=9, num_near_tie=1, num_different=0),
    }
    return Measurement(**(values | changes))


def prompts(*num_verify_steps: int, num_output_tokens: int = 30, ids_digest: str = "of the suite") -> PromptSums:
    """So many tokens for each prompt, in so many steps."""
    return PromptSums(
        ids_digest=ids_digest,
        num_output_tokens=(num_output_tokens,) * len(num_verify_steps),
        num_verify_steps=num_verify_steps,
    )


def result(*measurements: Measurement) -> BenchmarkResult:
    environment = Environment(
        cpu="Made-up CPU 9000",
        num_threads=4,
        gpu=None,
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        commit="0123abc",
        command="python -m specforge_core benchmark --spec spec.json --out out",
    )
    return BenchmarkResult(measurements=measurements, environment=environment)


def chain(num_steps: int, topk: int, num_draft_tokens: int, concurrency: int = 1) -> ServingConfig:
    return ServingConfig(num_steps=num_steps, topk=topk, num_draft_tokens=num_draft_tokens, concurrency=concurrency)


def sweep_point(
    serving: ServingConfig, baseline: tuple[float, ...], with_draft: tuple[float, ...], **changes: Any
) -> SweepPoint:
    """2,700 tokens in 1,000 steps: acceptance length 2.7."""
    values: dict[str, Any] = {"num_requests": 12, "num_output_tokens": 2700, "num_verify_steps": 1000}
    return SweepPoint(
        serving=serving,
        baseline_output_tokens_per_s=baseline,
        output_tokens_per_s=with_draft,
        **(values | changes),
    )


def sweep() -> tuple[SweepPoint, ...]:
    """Two chains and a tree at four loads: the long chain wins alone, the short one at 8, at 16 there is a tie with the
    target alone, at 32 every draft loses."""
    short, long, tree = (2, 1, 3), (7, 1, 8), (5, 4, 16)
    return (
        sweep_point(chain(*short), (155.0, 155.0, 157.0), (295.0, 290.0, 300.0)),
        sweep_point(chain(*long), (155.0, 156.0, 154.0), (340.0, 350.0, 330.0), num_output_tokens=3500),
        sweep_point(chain(*tree), (155.0, 155.0, 155.0), (310.0, 312.0, 311.0), num_output_tokens=3700),
        sweep_point(chain(*short, 8), (1130.0, 1140.0, 1120.0), (1470.0, 1460.0, 1480.0)),
        sweep_point(chain(*long, 8), (1130.0, 1130.0, 1130.0), (1300.0, 1290.0, 1310.0), num_output_tokens=3500),
        sweep_point(chain(*tree, 8), (1130.0, 1130.0, 1130.0), (1000.0, 990.0, 1010.0), num_output_tokens=3700),
        sweep_point(chain(*short, 16), (2200.0, 2100.0, 2300.0), (2250.0, 2200.0, 2200.0)),
        sweep_point(chain(*long, 16), (2200.0, 2200.0, 2200.0), (1900.0, 1800.0, 2000.0), num_output_tokens=3500),
        sweep_point(chain(*tree, 16), (2200.0, 2200.0, 2200.0), (1200.0, 1250.0, 1300.0), num_output_tokens=3700),
        sweep_point(chain(*short, 32), (4200.0, 4210.0, 4190.0), (3900.0, 3800.0, 3700.0)),
        sweep_point(chain(*long, 32), (4200.0, 4200.0, 4200.0), (2500.0, 2600.0, 2700.0), num_output_tokens=3500),
        sweep_point(chain(*tree, 32), (4200.0, 4200.0, 4200.0), (1500.0, 1600.0, 1700.0), num_output_tokens=3700),
    )


def served_result(*measurements: Measurement, **changes: Any) -> BenchmarkResult:
    """What servers measured, with the sweep above."""
    made = result(*measurements)
    gpu = made.environment.model_copy(update={"gpu": "Made-up GPU", "versions": {"torch": "2.13.0"}})
    servers = {
        name: ServerRecord(version="0.5.14", command=f"python -m sglang.launch_server --port 3{i}", gpus=("0",))
        for i, name in enumerate(("baseline", "3-1-4"))
    }
    values: dict[str, Any] = {"environment": gpu, "engine": "sglang", "sweep": sweep(), "servers": servers}
    return made.model_copy(update=values | changes)


def vocabulary(coverage: float = 0.9876) -> Vocabulary:
    return Vocabulary(draft_vocab_size=1000, target_vocab_size=4096, coverage=coverage)


def entry(**changes: Any) -> ManifestEntry:
    source = PromptSource(dataset="builtin:demo", split="train")
    # Two parts of one data set.
    held_out = PromptSource(dataset="builtin:demo", split="test")
    suites = tuple(SuiteConfig(name=name, source=held_out) for name in ("math", "code"))
    values: dict[str, Any] = {
        "name": "demo",
        "target": TargetConfig(model=TARGET.model, revision=REVISION),
        "data": DataConfig(sources=(source,)),
        "benchmark": BenchmarkConfig(suites=suites),
        "gates": GatesConfig(min_acceptance_length=2.5, min_speedup=1.5),
        "publish": PublishConfig(repository="specbundle/llama-eagle3", license="llama3.1"),
    }
    return ManifestEntry(**(values | changes))


def artifacts(root: Path, benchmark: BenchmarkResult | None = None) -> BuildArtifacts:
    """The six artifacts on disk; the draft's holds two small files."""
    facts = {
        "regenerate": Conversations(
            num_conversations=768,
            num_tokens=123_456,
            num_loss_tokens=65_432,
            num_failed=3,
            num_cut_off=5,
            chat_template_sha256="ab" * 32,
        ),
        "vocabulary": vocabulary(),
        "capture": HiddenStates(
            layers=(1, 15, 28),
            num_target_layers=32,
            hidden_size=4096,
            dtype="bfloat16",
            num_documents=768,
            num_tokens=123_456,
            num_loss_tokens=65_432,
            num_shards=1,
        ),
        "train": DraftCheckpoint(
            algorithm="eagle3",
            step=150,
            tokens_seen=300_000,
            num_parameters=1_234_567,
            eval_loss=1.25,
            eval_accuracy=(0.8, 0.7, 0.6),
            eval_acceptance=(0.75, 0.65, 0.55),
            eval_acceptance_length=2.9,
        ),
        "export": ServingDraft(architecture="LlamaForCausalLMEagle3", num_parameters=1_234_567, max_reload_error=0.0),
        "benchmark": benchmark or result(measurement("math"), measurement("code")),
    }
    for stage in facts:
        (root / stage).mkdir(parents=True)
    (root / "export/model.safetensors").write_bytes(b"\0" * 1000)
    (root / "export/config.json").write_text('{"architectures": ["LlamaForCausalLMEagle3"]}')
    sealed = [
        seal(
            root / stage, record, stage=stage, key=f"key-{stage}", inputs={}, elapsed_s=90.0, hardware="2 x Made-up GPU"
        )
        for stage, record in facts.items()
    ]
    return BuildArtifacts(*sealed)
