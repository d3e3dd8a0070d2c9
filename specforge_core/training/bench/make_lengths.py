"""Writes the lengths of real conversations that the training benchmark draws from.

    python -m specforge_core.training.bench.make_lengths FOLDER

FOLDER holds data sets of questions with answers, each in a folder of its own, as their authors publish them:

    gsm8k/train.jsonl, test.jsonl          openai/grade-school-math, MIT
    svamp/SVAMP.json                       arkilpatel/SVAMP, MIT
    aqua/dev.json, test.json               google-deepmind/AQuA, Apache-2.0
    humaneval/HumanEval.jsonl.gz           openai/human-eval, MIT
    mbpp/mbpp.jsonl                        google-research/google-research, CC-BY-4.0
    self_instruct/seed_tasks.jsonl         yizhongw/self-instruct, Apache-2.0
    gpteacher/codegen-instruct.json        teknium1/GPTeacher, MIT

Only lengths are kept, no text. They are estimates: a token is taken for 4 bytes of UTF-8, about what current tokenizers
reach on English and code, plus the tokens of a chat template. All of these are conversations of one turn; the file's
form allows more.
"""

import argparse
import gzip
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from specforge_core.training.bench.lengths import LENGTHS_NAME, Conversation, RealLengths, Turn

BYTES_PER_TOKEN = 4.0
PROMPT_OVERHEAD_TOKENS = 10
"""Beginning of text, the header of each role (4 tokens in Llama 3's template), the end of the user's turn."""
ANSWER_OVERHEAD_TOKENS = 1
"""The end of the answer's turn, which the target produces."""
MAX_PER_SOURCE = 1000
"""So that no data set outweighs the others."""
SEED = 0


def main() -> None:
    """Write the file beside this program, where the benchmark finds it."""
    parser = argparse.ArgumentParser(prog="python -m specforge_core.training.bench.make_lengths", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    path = Path(__file__).parent / LENGTHS_NAME
    lengths = make_lengths(folder)
    # Without a time in it, equal data give an equal file.
    path.write_bytes(gzip.compress(lengths.model_dump_json().encode(), mtime=0))


def make_lengths(folder: Path) -> RealLengths:
    """At most `MAX_PER_SOURCE` conversations of each data set, chosen at random."""
    rng = random.Random(SEED)
    sources = {}
    for name, read in READERS.items():
        conversations = [_lengths(question, answer) for question, answer in read(folder / name)]
        sources[name] = tuple(rng.sample(conversations, min(len(conversations), MAX_PER_SOURCE)))
    return RealLengths(
        bytes_per_token=BYTES_PER_TOKEN,
        prompt_overhead_tokens=PROMPT_OVERHEAD_TOKENS,
        answer_overhead_tokens=ANSWER_OVERHEAD_TOKENS,
        sources=sources,
    )


def _lengths(question: str, answer: str) -> Conversation:
    return (
        Turn(
            prompt=PROMPT_OVERHEAD_TOKENS + estimate_tokens(question),
            answer=ANSWER_OVERHEAD_TOKENS + estimate_tokens(answer),
        ),
    )


def estimate_tokens(text: str) -> int:
    """Tokens of a text, by its bytes."""
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


def _read_jsonl(*paths: Path) -> Iterator[dict[str, Any]]:
    for path in paths:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        yield from (json.loads(line) for line in content.decode().splitlines() if line)


def _gsm8k(folder: Path) -> Iterator[tuple[str, str]]:
    for row in _read_jsonl(folder / "train.jsonl", folder / "test.jsonl"):
        yield row["question"], row["answer"]


def _svamp(folder: Path) -> Iterator[tuple[str, str]]:
    for row in json.loads((folder / "SVAMP.json").read_text(encoding="utf-8")):
        yield f"{row['Body']} {row['Question']}", f"{row['Equation']} = {row['Answer']}"


def _aqua(folder: Path) -> Iterator[tuple[str, str]]:
    for row in _read_jsonl(folder / "dev.json", folder / "test.json"):
        yield "\n".join((row["question"], *row["options"])), row["rationale"]


def _humaneval(folder: Path) -> Iterator[tuple[str, str]]:
    for row in _read_jsonl(folder / "HumanEval.jsonl.gz"):
        yield row["prompt"], row["canonical_solution"]


def _mbpp(folder: Path) -> Iterator[tuple[str, str]]:
    for row in _read_jsonl(folder / "mbpp.jsonl"):
        yield "\n".join((row["text"], *row["test_list"])), row["code"]


def _self_instruct(folder: Path) -> Iterator[tuple[str, str]]:
    for row in _read_jsonl(folder / "seed_tasks.jsonl"):
        for instance in row["instances"]:
            yield f"{row['instruction']}\n{instance['input']}", instance["output"]


def _gpteacher(folder: Path) -> Iterator[tuple[str, str]]:
    for row in json.loads((folder / "codegen-instruct.json").read_text(encoding="utf-8")):
        yield f"{row['instruction']}\n{row['input']}", row["response"]


READERS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    "gsm8k": _gsm8k,
    "svamp": _svamp,
    "aqua": _aqua,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "self_instruct": _self_instruct,
    "gpteacher": _gpteacher,
}


if __name__ == "__main__":
    main()
