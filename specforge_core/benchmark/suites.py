"""The requests of a benchmark suite: the last question of each prompt, after a conversation that the target had itself.

Earlier answers are greedy and the same for every draft, so drafts are compared on equal contexts.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from specforge_core.benchmark.answers import reference_answer
from specforge_core.benchmark.measure import AnswerKey, Workload
from specforge_core.data.chat_template import next_turn_ids, prompt_ids
from specforge_core.data.prompts import Message, Prompt, load_prompts
from specforge_core.stages import ResolvedBenchmark, ResolvedSuite
from specforge_core.targets import Completion, GenerationRequest, Sampling

logger = logging.getLogger(__name__)

TEMPLATE_TOKENS = 64
"""Of a chat template around one message, at most; a system prompt of its own counts as another message."""


class Interlocutor(NamedTuple):
    """The target as one talks to it, wherever it runs."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int
    """Tokens of a prompt and its answer together."""
    answer: Callable[[Sequence[GenerationRequest], Sampling], Iterable[Completion]]
    """Completions, in any order."""


@dataclass
class _Dialogue:
    """A prompt, as far as it is asked: `messages` ends with the question that `request` puts."""

    messages: list[Message]
    request: GenerationRequest
    later_questions: list[Message]


def load_requests(suite: ResolvedSuite, target: Interlocutor) -> list[GenerationRequest]:
    """One request a prompt, in the suite's order; equal prompts are asked once.

    A prompt that the chat template refuses or that leaves no room for an answer is left out with a warning. Where a
    conversation cannot go on (an answer was cut off, or the template does not keep the history), its last question is
    the one that it got to.

    Raises: ValueError if no prompt is left.
    """
    prompts = {prompt.id: prompt for prompt in load_prompts(suite.source)}
    dialogues = {
        dialogue.request.id: dialogue for prompt in prompts.values() if (dialogue := _begin(prompt, target)) is not None
    }
    if len(dialogues) < len(prompts):
        logger.warning("suite %s: %d of %d prompts left out", suite.name, len(prompts) - len(dialogues), len(prompts))
    if not dialogues:
        raise ValueError(
            f"suite {suite.name}: none of the {len(prompts)} prompts of {suite.source.dataset} can be asked"
        )
    asked = [dialogue for dialogue in dialogues.values() if dialogue.later_questions]
    while asked:
        for completion in target.answer([dialogue.request for dialogue in asked], Sampling(suite.max_new_tokens)):
            _go_on(dialogues[completion.id], completion, target)
        asked = [dialogue for dialogue in asked if dialogue.later_questions]
    return [dialogue.request for dialogue in dialogues.values()]


def suite_workloads(benchmark: ResolvedBenchmark, target: Interlocutor) -> list[Workload]:
    """Every suite at every serving configuration. Raises: as `load_requests` and `load_references`."""
    return [
        Workload(
            suite=suite.name,
            requests=requests,
            sampling=Sampling(suite.max_new_tokens, benchmark.temperature, seed=benchmark.seed),
            serving=serving,
            repeats=benchmark.repeats,
            answer_key=key,
        )
        for suite in benchmark.suites
        for requests, key in [(load_requests(suite, target), answer_key(suite))]
        for serving in benchmark.serving
    ]


def answer_key(suite: ResolvedSuite) -> AnswerKey | None:
    """What the suite's answers are checked against; None if they are not."""
    return AnswerKey(suite.answer.kind, load_references(suite)) if suite.answer else None


def longest_request(suite: ResolvedSuite, tokenizer: PreTrainedTokenizerBase, context_length: int) -> int:
    """Tokens, at most, of a prompt of the suite with all answers: what a server must have room for, for each request.

    Known before the target has answered anything: every answer counts with its limit.
    """
    longest = 1
    for prompt in load_prompts(suite.source):
        num_questions = sum(message["role"] == "user" for message in prompt.messages)
        texts = tokenizer([message["content"] for message in prompt.messages], add_special_tokens=False)["input_ids"]
        num_prompt_tokens = sum(map(len, texts)) + TEMPLATE_TOKENS * (len(texts) + 1)
        longest = max(longest, num_prompt_tokens + num_questions * suite.max_new_tokens)
    return min(longest, context_length)


def load_references(suite: ResolvedSuite) -> dict[str, str]:
    """The reference answer by request id, as the data set writes it; empty for a suite whose answers are not checked.

    A prompt has none if its row has none, or if it holds several questions: its request may stop before the last one,
    which the row's answer is for.

    Raises: ValueError if the column is not there, an answer is none of the suite's kind, or no prompt has one.
    """
    if suite.answer is None:
        return {}
    references = {}
    for prompt in load_prompts(suite.source, answer_column=suite.answer.column):
        num_questions = sum(message["role"] == "user" for message in prompt.messages)
        if prompt.final_answer is None or num_questions > 1:
            continue
        try:
            reference_answer(suite.answer.kind, prompt.final_answer)
        except ValueError as error:
            raise ValueError(f"suite {suite.name}: {error}") from None
        references[prompt.id] = prompt.final_answer
    if not references:
        raise ValueError(
            f"suite {suite.name}: no prompt of one question has an answer in the column {suite.answer.column!r}; "
            "name another column, or remove `answer`"
        )
    return references


def _begin(prompt: Prompt, target: Interlocutor) -> _Dialogue | None:
    first_question = next(i for i, message in enumerate(prompt.messages) if message["role"] == "user")
    messages = list(prompt.messages[: first_question + 1])
    try:
        input_ids = prompt_ids(target.tokenizer, messages)
    except jinja2.TemplateError as error:
        logger.warning("prompt %s: the chat template refuses it: %s", prompt.id, error)
        return None
    if len(input_ids) >= target.context_length:
        logger.warning(
            "prompt %s: %d tokens leave no room for an answer within the target's %d",
            prompt.id,
            len(input_ids),
            target.context_length,
        )
        return None
    return _Dialogue(messages, GenerationRequest(prompt.id, input_ids), list(prompt.messages[first_question + 1 :]))


def _go_on(dialogue: _Dialogue, completion: Completion, target: Interlocutor) -> None:
    """Put the next question, or make the present one the last."""
    question, *dialogue.later_questions = dialogue.later_questions
    answer = target.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    messages: list[Message] = [*dialogue.messages, {"role": "assistant", "content": answer}, question]
    added_ids = None
    if completion.finish_reason == "stop":
        with contextlib.suppress(jinja2.TemplateError):
            added_ids = next_turn_ids(target.tokenizer, messages, end_id=completion.token_ids[-1])
    input_ids = [*dialogue.request.input_ids, *completion.token_ids, *(added_ids or [])]
    if added_ids is None or len(input_ids) >= target.context_length:
        dialogue.later_questions = []
        return
    dialogue.messages = messages
    dialogue.request = GenerationRequest(dialogue.request.id, input_ids)
