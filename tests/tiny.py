"""A target small enough for a unit test, made on the spot: random weights, real `transformers` folder."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specforge_core.stages import ResolvedTarget

NUM_LAYERS = 8
HIDDEN_SIZE = 64
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_target(directory: Path, *, seed: int = 0) -> Path:
    """A Llama-architecture folder: 8 layers, width 64, 4 query and 2 KV heads of 16, vocabulary 259, float32."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=160,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        # Wide enough that a random model has clear favourites and greedy decoding is no coin toss.
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_talkative_target(directory: Path) -> Path:
    """The same with answers that end by themselves every few tokens."""
    make_target(directory, seed=1)
    model = LlamaForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        # Of the random logits the end-of-turn token's swings widest, so it wins now and then.
        model.lm_head.weight[model.config.eos_token_id] *= 1.6
    model.save_pretrained(directory)
    return directory


def resolved(directory: Path) -> ResolvedTarget:
    """The folder as a stage spec names it, computing in float32."""
    return ResolvedTarget(model=str(directory), content_id="tiny", dtype="float32")
