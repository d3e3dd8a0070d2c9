"""The stage with a slow scripted backend, to be killed."""

from pathlib import Path

import datasets

from specforge_core.data.regenerate import regenerate
from specforge_core.stages import RegenerateSpec
from tests.data.scripted_target import TOKENIZER, ScriptedTarget


def answer(question: str) -> str:
    """The same text in every process, of another length for every question."""
    return f"You asked: {question}" + "!" * (len(question) % 5)


def regenerate_slowly(spec: RegenerateSpec, out: Path, cache: Path) -> None:
    """Run the stage in a process of its own. Args: cache: of data sets."""
    datasets.config.HF_DATASETS_CACHE = cache
    regenerate(spec, ScriptedTarget(answer, delay_s=0.1), TOKENIZER, out)
