"""Sizes of drafts worth measuring, and the FLOPs that training them takes. Torch-free.

T tokens of a packed batch, S steps of training-time test.
"""

from typing import Any, NamedTuple

PEAK_BF16_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by a part of the GPU's name, from NVIDIA's data sheets; the first that fits counts."""

FORWARD_AND_BACKWARD = 6
"""FLOPs for each weight and row: two for the product, two each for the gradients of input and weight."""
WITHOUT_INPUT_GRADIENT = 4
FORWARD_ONLY = 2


class Shape(NamedTuple):
    """One draft with the target that it belongs to."""

    width: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int = 32_000
    rope_theta: float = 5e5
    document_tokens: int = 4096
    """Of documents of uniform length."""

    def target_config(self) -> dict[str, Any]:
        """The `config.json` of a target of this shape, as far as a draft reads it."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": self.rope_theta,
            "vocab_size": self.vocab_size,
        }


SHAPES = {
    "llama-3.1-8b": Shape(4096, 14_336, 32, 8, 128, 128_256),
    "qwen3-8b": Shape(4096, 12_288, 32, 8, 128, 151_936, rope_theta=1e6),
    # The experts of a mixture are too narrow for a dense draft; these two widths are those of SpecForge's public draft
    # configs. 6,144 is the `intermediate_size` of the target's own config too, 24,576 is twice that.
    "qwen3-30b-a3b": Shape(2048, 6144, 32, 4, 128, 151_936, rope_theta=1e6),
    "llama-3.3-70b": Shape(8192, 28_672, 64, 8, 128, 128_256),
    "qwen3-235b-a22b": Shape(4096, 24_576, 64, 4, 128, 151_936, rope_theta=1e6),
    "tiny": Shape(32, 48, 4, 2, 8, 96, 64, document_tokens=64),
}


class RowCounts(NamedTuple):
    """How much of a batch a trainer has to compute at least."""

    num_tokens: int
    num_teachers: int
    """Tokens whose teacher distribution some supervised slot reads."""
    rows_S: tuple[int, ...]
    """Supervised slots by step."""
    num_keys: int
    """Keys that all queries of all steps read together."""


def dense_flops(shape: Shape, num_tokens: int, num_steps: int) -> float:
    """FLOPs by the usual count: every token goes through everything at every step; no attention.

    6 S (qkv over 2 H + o + feed-forward + head) + 6 fc + 2 teacher head, for each token.
    """
    heads_width, kv_width = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
    qkv = 2 * shape.width * (heads_width + kv_width)
    output = heads_width * shape.width
    feed_forward = 3 * shape.width * shape.intermediate_size
    head = shape.width * shape.draft_vocab_size
    by_step = FORWARD_AND_BACKWARD * (qkv + output + feed_forward + head)
    fc = FORWARD_AND_BACKWARD * 3 * shape.width**2
    return float(num_tokens * (num_steps * by_step + fc + FORWARD_ONLY * head))


def useful_flops(shape: Shape, counts: RowCounts) -> float:
    """FLOPs that exact training cannot do without, attention included: the same number whatever path is measured.

    Only supervised slots go through queries, output projection, feed-forward and head. The fused hidden state and the
    step-0 keys and values are computed for each token, the embedding half of q, k, v once per token. Frozen inputs get
    no gradient. A path that recomputes in its backward pass gets no credit for it.
    """
    width, heads_width = shape.width, shape.num_heads * shape.head_dim
    kv_width = 2 * shape.num_kv_heads * shape.head_dim
    first, total = counts.rows_S[0], sum(counts.rows_S)
    tokens = counts.num_tokens
    fc = WITHOUT_INPUT_GRADIENT * tokens * 3 * width**2
    embedding_half = WITHOUT_INPUT_GRADIENT * width * (counts.num_teachers * heads_width + tokens * kv_width)
    by_row = heads_width + kv_width + heads_width + 3 * shape.intermediate_size + shape.draft_vocab_size
    rows = FORWARD_AND_BACKWARD * width * (total * by_row + (tokens - first) * kv_width)
    teacher = FORWARD_ONLY * counts.num_teachers * width * shape.draft_vocab_size
    return float(fc + embedding_half + rows + teacher + attention_flops(shape, counts))


def attention_flops(shape: Shape, counts: RowCounts) -> float:
    """Those of attention: two products forward, four backward, 2 FLOPs for each query head, key and channel."""
    return 12.0 * shape.num_heads * shape.head_dim * counts.num_keys


def peak_flops(gpu: str | None) -> float | None:
    """Dense bfloat16 FLOP/s of that GPU; None if it is not known."""
    return next((flops for name, flops in PEAK_BF16_FLOPS.items() if gpu and name in gpu), None)
