"""What is assumed about the conversations that an entry will have. Torch-free."""

from typing import NamedTuple

from specforge_core.artifacts import Store
from specforge_core.cost.configs import hub_facts
from specforge_core.facts import Conversations
from specforge_core.ledger import last_artifact
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_sections import PromptSource
from specforge_core.training.bench.lengths import (
    Conversation,
    Turn,
    count_answer_tokens,
    count_tokens,
    load_real_lengths,
)


class ExpectedConversations(NamedTuple):
    """How many, and what they are like."""

    num_conversations: int
    sample: tuple[Conversation, ...]
    """Of their lengths; each stands for as many."""
    source: str
    """Why so many of that length, in words."""

    @property
    def tokens_each(self) -> float:
        """Prompts and answers, on average."""
        return sum(map(count_tokens, self.sample)) / len(self.sample)

    @property
    def answer_tokens_each(self) -> float:
        """On average."""
        return sum(map(count_answer_tokens, self.sample)) / len(self.sample)

    @property
    def answers_each(self) -> float:
        """Turns, on average."""
        return sum(map(len, self.sample)) / len(self.sample)

    @property
    def answer_tokens(self) -> float:
        """Of one answer, on average."""
        return self.answer_tokens_each / self.answers_each

    @property
    def prompt_tokens(self) -> float:
        """That come before one answer and after the one before it, on average."""
        return (self.tokens_each - self.answer_tokens_each) / self.answers_each

    @property
    def num_tokens(self) -> float:
        """All together."""
        return self.num_conversations * self.tokens_each

    @property
    def num_answer_tokens(self) -> float:
        """All together."""
        return self.num_conversations * self.answer_tokens_each

    @property
    def keys_per_token(self) -> float:
        """Tokens before one and itself, on average over tokens: what a causal query attends to."""
        lengths = list(map(count_tokens, self.sample))
        return sum(length * (length + 1) / 2 for length in lengths) / sum(lengths)


def expected_conversations(
    entry: ManifestEntry, store: Store | None, tokens_per_conversation: tuple[int, int] | None
) -> ExpectedConversations:
    """Those that the store has, or else an assumption.

    Args: tokens_per_conversation: of prompt and answer, where the user knows them.
    Raises: ValueError for a source that has no limit and whose size is not known.
    """
    stored = last_artifact(store, entry.name, "regenerate") if store else None
    facts: Conversations | None = stored.facts if stored else None
    if stored and facts and tokens_per_conversation is None:
        answer = facts.num_loss_tokens / facts.num_conversations
        turn = Turn(round(facts.num_tokens / facts.num_conversations - answer), round(answer))
        return ExpectedConversations(facts.num_conversations, ((turn,),), f"those in the store, {stored.key}")
    count = facts.num_conversations if facts else sum(map(_num_conversations, entry.data.sources))
    sample, source = _assumed_lengths(entry, tokens_per_conversation)
    return ExpectedConversations(count, tuple(_within_limits(entry, one) for one in sample), source)


def _num_conversations(source: PromptSource) -> int:
    num_rows: int | None = hub_facts()["datasets"].get(source.dataset, {}).get("num_rows")
    if source.limit is None and num_rows is None:
        raise ValueError(
            f"{source.dataset} has no limit and its size is not known here; set data.sources.limit to count"
        )
    return min(limit for limit in (source.limit, num_rows) if limit is not None)


def _assumed_lengths(
    entry: ManifestEntry, tokens_per_conversation: tuple[int, int] | None
) -> tuple[tuple[Conversation, ...], str]:
    if tokens_per_conversation:
        return ((Turn(*tokens_per_conversation),),), "as --tokens-per-conversation says"
    known = [hub_facts()["datasets"].get(source.dataset, {}) for source in entry.data.sources]
    if all("tokens_per_conversation" in facts for facts in known):
        facts = known[0]
        half = facts["tokens_per_conversation"] // 2
        return ((Turn(half, half),),), f"{facts['tokens_source']}; half of them in answers"
    return (
        tuple(load_real_lengths().conversations),
        "lengths of public instruction data with short human answers, as nothing is known about these; a target that "
        "writes long ones needs --tokens-per-conversation",
    )


def _within_limits(entry: ManifestEntry, conversation: Conversation) -> Conversation:
    data = entry.data
    return tuple(
        Turn(min(turn.prompt, data.max_prompt_tokens), min(turn.answer, data.max_new_tokens)) for turn in conversation
    )
