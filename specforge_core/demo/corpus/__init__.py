"""Procedural conversations with computed answers: the training data and the prompts of the embedded default.

Every problem has a key, the facts that make it up; the key's hash puts it into "train" or "heldout", so that no
held-out problem can be met in training, in whatever words it is asked.
"""

from specforge_core.demo.corpus.problem import Split, answers_match, split_of
from specforge_core.demo.corpus.stream import FAMILIES, Conversation, generate, write_jsonl

__all__ = ["FAMILIES", "Conversation", "Split", "answers_match", "generate", "split_of", "write_jsonl"]
