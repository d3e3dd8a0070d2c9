"""Public figures are compared only where nothing but the draft differs."""

import pytest

from specforge_core.manifest_sections import ServingConfig
from specforge_core.site.anchors import comparable, load_anchors
from tests.made_build import measurement

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def figures(target: str, suite: str, serving: ServingConfig) -> list[tuple[str, float | None, float | None]]:
    found = comparable(load_anchors(), target, measurement(suite, serving=serving))
    return [(anchor.draft, anchor.acceptance_length, anchor.speedup) for anchor in found]


def test_figures_stand_as_they_were_published() -> None:
    # The dashboard's rows for Llama-3.1-8B, batch 1, chain 3-1-4 and 7-1-8.
    assert figures(LLAMA, "gsm8k", ServingConfig()) == [
        ("lmsys/SGLang-EAGLE3-Llama-3.1-8B-Instruct-SpecForge", 2.55, 1.77),
        ("lmsys/sglang-EAGLE3-LLaMA3.1-Instruct-8B", 1.72, 1.26),
    ]
    long = ServingConfig(num_steps=7, num_draft_tokens=8)
    assert figures(LLAMA, "math500", long)[0][1:] == (5.40, 3.34)
    # The paper's SGLang figures for batch 8: no acceptance length there.
    assert figures(LLAMA, "mtbench", ServingConfig(concurrency=8)) == [
        ("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", None, 1.62)
    ]


@pytest.mark.parametrize(
    ("target", "suite", "serving"),
    [
        ("Qwen/Qwen3-8B", "gsm8k", ServingConfig()),
        (LLAMA, "mbpp", ServingConfig()),
        (LLAMA, "gsm8k", ServingConfig(concurrency=8)),
        (LLAMA, "gsm8k", ServingConfig(num_steps=5, num_draft_tokens=6)),
    ],
)
def test_another_target_suite_load_or_chain_is_not_compared(target: str, suite: str, serving: ServingConfig) -> None:
    assert figures(target, suite, serving) == []


def test_a_tree_is_compared_with_nothing() -> None:
    trees = [anchor for anchor in load_anchors() if anchor.shape() == "tree"]
    # Table 1 of the paper: four targets, five suites.
    assert len(trees) == 20
    servings = [ServingConfig(), ServingConfig(num_steps=7, topk=10, num_draft_tokens=60)]
    assert not any(anchor.is_comparable(serving) for anchor in trees for serving in servings)


def test_every_figure_names_a_source_on_the_web_and_none_is_impossible() -> None:
    anchors = load_anchors()
    assert len(anchors) == 177
    assert all(anchor.source.url.startswith("https://") and anchor.source.conditions for anchor in anchors)
    # A speedup above the acceptance length is an error of measurement, as in the dashboard's rows of Llama-4-Scout.
    both = [anchor for anchor in anchors if anchor.acceptance_length and anchor.speedup]
    assert all(anchor.speedup <= anchor.acceptance_length for anchor in both)
    assert not any("Scout" in anchor.target for anchor in anchors)
