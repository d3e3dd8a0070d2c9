"""Tokenizer of the demo target, and the corpus as one flat array of token ids."""

import functools
import hashlib
import json
import multiprocessing
import os
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from specforge_core.demo.corpus import Conversation, Split, generate

VOCAB_SIZE = 2048
MAX_POSITIONS = 2048
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

TOKENIZER_CONVERSATIONS = 40_000
CHUNK_CONVERSATIONS = 8_000
# Seeds of the training stream start here; the tokenizer's own sample uses seed 0.
FIRST_SEED = 1_000


class TokenizedCorpus(NamedTuple):
    """Conversations laid end to end. N tokens, R conversations.

    tokens_N: uint16 ids; loss_N: bool, True where the assistant wrote the token, its end-of-turn included
    starts_R1: int64 offsets, one more than there are conversations
    """

    tokens_N: np.ndarray
    loss_N: np.ndarray
    starts_R1: np.ndarray


def rendered(conversation: Conversation) -> str:
    """The conversation as the chat template writes it, without the cost of Jinja."""
    return "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in conversation.messages)


def train_tokenizer(out: Path) -> None:
    """Write a byte-level BPE tokenizer trained on the corpus; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Without its special tokens a conversation is plain text to the trainer.
    texts = (
        f"{m['role']}\n{m['content']}"
        for conversation in islice(generate("train", seed=0), TOKENIZER_CONVERSATIONS)
        for m in conversation.messages
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    # transformers 5 writes a class name that version 4, which servers still use, does not know.
    config_path = out / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The saved tokenizer; refuses one that disagrees with the fast rendering of this file."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    conversation = next(generate("train", seed=0, family="followup"))
    by_template = tokenizer.apply_chat_template(list(conversation.messages), tokenize=False)
    assert by_template == rendered(conversation), "chat template and `rendered` have drifted apart"
    return tokenizer


def assistant_mask(ids: np.ndarray, start: int, end: int, assistant: int) -> np.ndarray:
    """True where the assistant wrote the token: after its two header tokens, up to and with the end-of-turn token."""
    turns = np.cumsum(ids == start)
    is_assistant = np.zeros(turns[-1] + 1, dtype=bool)
    headers = np.flatnonzero(ids == start)
    is_assistant[1:] = ids[headers + 1] == assistant
    mask = is_assistant[turns]
    for offset in range(3):
        mask[headers + offset] = False
    # The newline after the end of a turn belongs to nobody; after the last turn there is none.
    newlines = np.flatnonzero(ids == end) + 1
    mask[newlines[newlines < len(ids)]] = False
    return mask


def tokenize(tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]) -> TokenizedCorpus:
    """The conversations as one flat array."""
    # The final newline is left off: after the end of the last turn nothing is to be predicted.
    texts = [rendered(conversation)[:-1] for conversation in conversations]
    # A call with padding leaves it switched on in a shared tokenizer, so that it must be switched off by name.
    encoded = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    rows = [np.array(ids, dtype=np.uint16) for ids in encoded]
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    (assistant,) = tokenizer.encode("assistant", add_special_tokens=False)
    masks = [assistant_mask(row, start, end, assistant) for row in rows]
    starts_R1 = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return TokenizedCorpus(np.concatenate(rows), np.concatenate(masks), starts_R1)


_cached_tokenizer = functools.cache(load_tokenizer)


def _chunk(task: tuple[Path, Split, int, int]) -> TokenizedCorpus:
    folder, split, seed, count = task
    # One process a core is parallel enough.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return tokenize(_cached_tokenizer(folder), list(islice(generate(split, seed=seed), count)))


def build_corpus(tokenizer_folder: Path, cache: Path, *, num_conversations: int, seed: int) -> TokenizedCorpus:
    """The tokenized training corpus, made on all cores and kept in `cache` for the next run."""
    # Ids mean nothing without their tokenizer, so its digest is part of the name.
    tokenizer_digest = hashlib.sha256((tokenizer_folder / "tokenizer.json").read_bytes()).hexdigest()[:16]
    folder = cache / f"corpus-{num_conversations}-{seed}-{tokenizer_digest}"
    # Written last.
    done = folder / "counts.json"
    paths = [folder / f"{name}.npy" for name in TokenizedCorpus._fields]
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        num_chunks = -(-num_conversations // CHUNK_CONVERSATIONS)
        first_seed = FIRST_SEED + seed * num_chunks
        begins = range(0, num_conversations, CHUNK_CONVERSATIONS)
        tasks: list[tuple[Path, Split, int, int]] = [
            (tokenizer_folder, "train", first_seed + chunk, min(CHUNK_CONVERSATIONS, num_conversations - begin))
            for chunk, begin in enumerate(begins)
        ]
        # Fresh processes: the parent may hold tokenizer threads, which a fork would lose.
        with multiprocessing.get_context("spawn").Pool(min(num_chunks, os.cpu_count() or 1)) as pool:
            chunks = list(tqdm(pool.imap(_chunk, tasks), total=num_chunks, desc="generate and tokenize", mininterval=5))
        lengths = np.concatenate([np.diff(chunk.starts_R1) for chunk in chunks])
        np.save(paths[0], np.concatenate([chunk.tokens_N for chunk in chunks]))
        np.save(paths[1], np.concatenate([chunk.loss_N for chunk in chunks]))
        np.save(paths[2], np.concatenate([[0], np.cumsum(lengths)]))
        done.write_text(json.dumps({"num_tokens": int(lengths.sum()), "num_conversations": len(lengths)}))
    return TokenizedCorpus(*(np.load(path, mmap_mode="r") for path in paths))
