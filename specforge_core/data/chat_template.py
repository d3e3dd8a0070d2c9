"""Token ids of chat prompts, by the target's own tokenizer and template. Generated text is never tokenised again."""

import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specforge_core.data.prompts import Message
from specforge_core.stages import ResolvedTarget

logger = logging.getLogger(__name__)


def load_tokenizer(target: ResolvedTarget) -> PreTrainedTokenizerBase:
    """The target's tokenizer, without the target."""
    return AutoTokenizer.from_pretrained(
        target.model, revision=target.revision or "main", trust_remote_code=target.trust_remote_code
    )


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256 of the tokenizer's chat template. Raises: ValueError if it has none."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "use the instruction-tuned model, or put a chat_template.jinja beside its tokenizer"
        )
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages, up to where the assistant's answer starts.

    Raises: jinja2.TemplateError if the template refuses the messages, say because it knows no system prompt.
    """
    return _ids(tokenizer, _rendered(tokenizer, messages))


def next_turn_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, end_id: int) -> list[int] | None:
    """Token ids that lead from a finished answer to where the next answer starts.

    The prompt of the next turn is the ids so far, the answer's ids as they were generated, and these.

    Args: messages: everything up to and including the next user turn, its last but one the answer as text;
    end_id: the token that the answer ended with, which stands in the generated ids already.
    Returns: the ids after `end_id`; None if the template does not keep the history as it was, because it rewrites an
    earlier answer (drops its thinking, trims its white space) or goes on after another token than `end_id`. A server
    would then send another prompt than history and question put together.
    Raises: jinja2.TemplateError, as `prompt_ids`.
    """
    history = _rendered(tokenizer, messages[:-2]) + messages[-2]["content"]
    rendered = _rendered(tokenizer, messages)
    if not rendered.startswith(history):
        _warn_once(tokenizer.name_or_path, "rewrites the answers of earlier turns")
        return None
    suffix_ids = _ids(tokenizer, rendered[len(history) :])
    if suffix_ids[:1] != [end_id]:
        _warn_once(tokenizer.name_or_path, "closes an answer with another token than the target does")
        return None
    return suffix_ids[1:]


@lru_cache
def _warn_once(model: str, what: str) -> None:
    logger.warning("the chat template of %s %s: such conversations end before the next turn", model, what)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes the special tokens itself, the first one included.
    encoding: Any = tokenizer(text, add_special_tokens=False)
    ids: list[int] = encoding["input_ids"]
    return ids
