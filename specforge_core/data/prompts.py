"""Prompts from a data set: what a person asked, without the answers that somebody else's model gave. Torch-free."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, cast, get_args

from specforge_core.digests import digest
from specforge_core.manifest_sections import BUILTIN_DEMO, PromptSource

logger = logging.getLogger(__name__)

DEMO_SEED = 1
"""The demo target is trained on another stream of the same corpus."""

# In the order of preference: a whole conversation says more than its first question.
PROMPT_COLUMNS = ("messages", "conversations", "turns", "prompt", "question", "instruction", "text")
INSTRUCTION_INPUT = "input"
"""The material that an `instruction` is about, in a column of its own."""
FINAL_ANSWER_COLUMN = "final_answer"

ACCEPTED_FORMS = (
    "`messages` (role, content), `conversations` (from, value), `turns` (user turns), "
    "or one prompt in `prompt`, `question`, `instruction` (with `input`) or `text`"
)
ACCEPTED_FILES = f"a JSON object on each line (or a list of them in a .json), in UTF-8, with {ACCEPTED_FORMS}"
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class Message(TypedDict):
    """One turn, in the form of the OpenAI chat API."""

    role: Role
    content: str


class Prompt(NamedTuple):
    """What the target is asked: system prompt, if any, and user turns. It answers every user turn itself."""

    id: str
    """Digest of the messages, so that equal prompts have equal ids."""
    source: str
    messages: tuple[Message, ...]
    final_answer: str | None = None
    """A short answer that the data set says is right."""


class UnusableRow(NamedTuple):
    """A row that holds no prompt."""

    source: str
    position: int
    reason: str


class _Unusable(ValueError):
    """Why a row holds no prompt."""


class _Row(NamedTuple):
    prompt: Any
    """In any accepted form, or in none."""
    final_answer: str | None


def load_prompts(source: PromptSource, *, answer_column: str | None = None) -> Iterator[Prompt]:
    """The prompts of a source in its own order; rows that hold none are counted and logged.

    Args: answer_column: with the final answers, which the source must have; `final_answer`, if it is there, when None.
    Raises: ValueError if no column holds prompts in a known form, if a named column is not there, or for the endless
    demo corpus without a limit.
    """
    num_unusable = 0
    for row in read_rows(source, answer_column=answer_column):
        if isinstance(row, Prompt):
            yield row
        else:
            num_unusable += 1
            logger.debug("%s row %d: %s", *row)
    if num_unusable:
        logger.warning("%s: %d rows hold no usable prompt", source_name(source), num_unusable)


def read_rows(source: PromptSource, *, answer_column: str | None = None) -> Iterator[Prompt | UnusableRow]:
    """One prompt, or the reason why there is none, for each row of the source. Args and errors as of `load_prompts`."""
    name = source_name(source)
    rows = _demo_rows(source) if source.dataset == BUILTIN_DEMO else _dataset_rows(source, answer_column)
    for position, row in enumerate(rows):
        try:
            messages = asked_messages(row.prompt)
        except _Unusable as reason:
            yield UnusableRow(name, position, str(reason))
            continue
        yield Prompt(digest(messages), name, messages, row.final_answer)


def source_name(source: PromptSource) -> str:
    """The source in words, without the folder that a local file happens to lie in."""
    is_local = source.dataset != BUILTIN_DEMO and Path(source.dataset).exists()
    dataset = Path(source.dataset).name if is_local else source.dataset
    return "/".join(part for part in (dataset, source.config, source.split) if part)


def asked_messages(prompt: Any) -> tuple[Message, ...]:
    """The system and user turns of a prompt in any accepted form; assistant turns are left out.

    User turns that follow each other are answered one by one, like any others.
    """
    if not isinstance(prompt, str | Sequence):
        raise _Unusable(f"a prompt is a text or a list of turns, this is {_shown(prompt)}")
    turns = [prompt] if isinstance(prompt, str) else prompt
    messages = [message for turn in turns if (message := _message(turn))["role"] != "assistant"]
    # An empty system prompt is how many data sets write that there is none.
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    if not any(message["role"] == "user" for message in messages):
        raise _Unusable("no user turn")
    for i, message in enumerate(messages):
        if message["role"] == "system" and i > 0:
            raise _Unusable("a system turn after another turn")
        if not message["content"].strip():
            raise _Unusable("an empty user turn")
    return tuple(messages)


def _message(turn: Any) -> Message:
    if isinstance(turn, str):
        return {"role": "user", "content": turn}
    if not isinstance(turn, Mapping):
        raise _Unusable(f"a turn is a text, or has a role and a content; this is {_shown(turn)}")
    # A data set with both forms has every key in every turn, None where it is not used.
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str) or role not in ROLES:
        raise _Unusable(f"role {role!r} is not one of {', '.join(ROLES)}")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    # What somebody else's assistant said may be anything: a tool call, an image, nothing.
    return {"role": ROLES[role], "content": "" if ROLES[role] == "assistant" else _text(content)}


def _text(content: Any) -> str:
    """A turn's content as text: a string, or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise _Unusable(f"a turn's content is a text or a list of text parts, this is {_shown(content)}")
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise _Unusable(f"a part of a turn is no text: {_shown(content)}")
    return "\n".join(texts)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _demo_rows(source: PromptSource) -> Iterator[_Row]:
    from specforge_core.demo import corpus

    if source.split not in get_args(corpus.Split):
        raise ValueError(f"{BUILTIN_DEMO} has the splits {', '.join(get_args(corpus.Split))}, not {source.split!r}")
    if source.limit is None:
        raise ValueError(f"{BUILTIN_DEMO} is endless: give its source a `limit`")
    conversations = corpus.generate(cast(corpus.Split, source.split), seed=DEMO_SEED, family=source.config)
    for conversation in islice(conversations, source.limit):
        yield _Row(conversation.messages, conversation.final_answer)


def _dataset_rows(source: PromptSource, answer_column: str | None) -> Iterator[_Row]:
    dataset = _load_dataset(source)
    column = source.column or next((name for name in PROMPT_COLUMNS if name in dataset.column_names), None)
    if column not in dataset.column_names:
        wanted = f"column={column!r} is not there" if column else "no column holds prompts in a known form"
        raise ValueError(
            f"{source_name(source)}: {wanted}; it has {', '.join(dataset.column_names)}. "
            f"Accepted: {ACCEPTED_FORMS}; or name the `column` that holds one of these forms"
        )
    if answer_column and answer_column not in dataset.column_names:
        raise ValueError(
            f"{source_name(source)}: the answer's column={answer_column!r} is not there; "
            f"it has {', '.join(dataset.column_names)}"
        )
    answer_column = answer_column or FINAL_ANSWER_COLUMN
    columns = [name for name in (column, INSTRUCTION_INPUT, answer_column) if name in dataset.column_names]
    try:
        for row in islice(dataset.select_columns(list(dict.fromkeys(columns))), source.limit):
            prompt, final_answer = row[column], row.get(answer_column)
            if column == "instruction" and isinstance(prompt, str) and row.get(INSTRUCTION_INPUT):
                prompt = f"{prompt}\n\n{row[INSTRUCTION_INPUT]}"
            yield _Row(prompt, None if final_answer is None else str(final_answer))
    except UnicodeDecodeError as error:
        # A text is decoded only when it is read.
        if not Path(source.dataset).is_file():
            raise
        raise _refusal(Path(source.dataset), error) from error


def _load_dataset(source: PromptSource) -> Any:
    # `datasets` takes a second to import, and the demo corpus does without.
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = Path(source.dataset)
    if not path.is_file():
        return load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    suffixes = [suffix for suffix in path.suffixes if suffix in FILE_BUILDERS]
    if not suffixes:
        raise ValueError(f"{path}: a local file of prompts ends in one of {', '.join(FILE_BUILDERS)}")
    try:
        return load_dataset(FILE_BUILDERS[suffixes[-1]], data_files=str(path), split=source.split)
    # StopIteration: of an empty file.
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        # Such as a full disk.
        if isinstance(error.__cause__, OSError):
            raise
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> ValueError:
    """What to say of a local file, of which `datasets` says less."""
    fault = None if ".parquet" in path.suffixes else _first_fault(path)
    return ValueError(f"{path}: {f'{fault}; accepted: {ACCEPTED_FILES}' if fault else error.__cause__ or error}")


def _first_fault(path: Path) -> str | None:
    """What is wrong with a JSON file, and in which line; None if nothing is found."""
    import fsspec

    num_rows = 0
    with fsspec.open(path, "rb", compression="infer") as lines:
        for number, chunk in enumerate(lines, 1):
            if is_list := num_rows == 0 and chunk.startswith(b"["):
                # It goes over all lines.
                chunk += b"".join(lines)
            try:
                text = chunk.decode("utf-8-sig").rstrip()
                value: Any = json.loads(text) if text else None
            except UnicodeDecodeError as error:
                line = number + chunk.count(b"\n", 0, error.start)
                return f"line {line} is not UTF-8 (it has a byte {chunk[error.start]:#x})"
            except json.JSONDecodeError as error:
                return f"line {number + error.lineno - 1} is not JSON ({error.msg}: character {error.colno})"
            if text and not is_list and not isinstance(value, dict):
                return f"line {number} is no object"
            num_rows += len(value) if is_list else bool(text)
    return None if num_rows else "it has no rows"
