"""A stored conversation as a person can check it: decoded from its token ids, the supervised tokens marked."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from specforge_core.data.chat_template import load_tokenizer
from specforge_core.data.conversations import load_conversations
from specforge_core.stages import ResolvedTarget

SUPERVISED_STYLE = "bold green"
UNSUPERVISED_STYLE = "dim"
OPEN_MARK, CLOSE_MARK = "⟦", "⟧"
"""Around supervised tokens where there are no colours."""


class Span(NamedTuple):
    """Neighbouring tokens with one value of the loss mask."""

    is_supervised: bool
    token_ids: list[int]


def show_conversation(directory: Path, *, id_or_index: str | int, target: ResolvedTarget) -> None:
    """Print a conversation of an artifact.

    Args: id_or_index: position in the artifact, or the first characters of an id.
    Raises: ValueError if there is no such conversation, or several.
    """
    conversations = load_conversations(directory)
    row = conversations[find_conversation(conversations["id"], id_or_index)]
    console = Console()
    console.print(render_conversation(load_tokenizer(target), row, has_colours=console.is_terminal), soft_wrap=True)


def find_conversation(ids: Any, id_or_index: str | int) -> int:
    """The position of the conversation. Raises: ValueError if there is no such one, or several."""
    number = int(id_or_index) if str(id_or_index).isdecimal() else None
    if number is not None and number < len(ids):
        return number
    matches = [i for i, conversation_id in enumerate(ids) if conversation_id.startswith(str(id_or_index))]
    if len(matches) != 1:
        raise ValueError(
            f"{len(matches)} of the {len(ids)} conversations have an id that starts with {id_or_index!r}; "
            f"give a longer start of one id, or a position from 0 to {len(ids) - 1}"
        )
    return matches[0]


def render_conversation(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], *, has_colours: bool) -> Text:
    """A stored row, turn by turn: what the target was given, and in colour or in brackets what it produced.

    Args: row: a row of `load_conversations`.
    """
    num_supervised = sum(row["loss_mask"])
    text = Text(
        f"{row['id']} from {row['source']}: {len(row['input_ids'])} tokens, {num_supervised} of them supervised\n",
        style="bold",
    )
    finish_reasons = iter(row["finish_reasons"])
    for span in spans(row["input_ids"], row["loss_mask"]):
        decoded = tokenizer.decode(span.token_ids, skip_special_tokens=False)
        if not span.is_supervised:
            text.append(f"\n── {len(span.token_ids)} tokens given\n", style="cyan")
            text.append(decoded, style=UNSUPERVISED_STYLE)
        else:
            text.append(f"\n── {len(span.token_ids)} tokens answered, {next(finish_reasons)}\n", style="cyan")
            text.append(decoded if has_colours else f"{OPEN_MARK}{decoded}{CLOSE_MARK}", style=SUPERVISED_STYLE)
    return text.append("\n")


def spans(input_ids: list[int], loss_mask: list[bool]) -> Iterator[Span]:
    """The tokens, cut wherever the loss mask changes."""
    start = 0
    for is_supervised, group in groupby(loss_mask):
        end = start + sum(1 for _ in group)
        yield Span(is_supervised, input_ids[start:end])
        start = end
