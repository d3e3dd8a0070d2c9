"""Run the stage with a slow scripted backend, to be killed: python -m tests.data.interrupted_regenerate SPEC OUT"""

import sys
from pathlib import Path

from specforge_core.data.regenerate import regenerate
from specforge_core.stages import RegenerateSpec
from tests.data.scripted_target import TOKENIZER, ScriptedTarget


def answer(question: str) -> str:
    """The same text in every process, of another length for every question."""
    return f"You asked: {question}" + "!" * (len(question) % 5)


if __name__ == "__main__":
    spec = RegenerateSpec.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    regenerate(spec, ScriptedTarget(answer, delay_s=0.1), TOKENIZER, Path(sys.argv[2]))
