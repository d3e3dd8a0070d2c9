"""A draft's weights, and the bytes and FLOPs of its training, counted from two configs alone. Torch-free."""

from collections.abc import Iterable, Mapping
from typing import Any

from specforge_core.cost.target_model import BYTES, TargetModel
from specforge_core.draft_limits import NUM_AUX_LAYERS, check_draft, text_config
from specforge_core.manifest_sections import DraftConfig, FeatureDtype, TrainingConfig
from specforge_core.training.bench.lengths import Conversation, Turn
from specforge_core.training.bench.shapes import RowCounts, Shape

MASTER_BYTES = 4
MOMENT_BYTES = 4
"""Of each weight: AdamW keeps two moments, Muon one."""
NEWTON_SCHULZ_STEPS = 5
"""Of `torch.optim.Muon`."""
COMPUTE_BYTES = 2
IDS_BYTES = 4 + 1
"""Of a stored token: its id and whether it is supervised."""
TEACHER_BYTES = 4 + 4
"""Of a teaching token: the target's favourite and its log-sum-exp."""
SCALE_BYTES = 4
FLOAT8_BYTES = 1


def draft_shape(draft: DraftConfig, config: Mapping[str, Any], target: TargetModel) -> Shape:
    """The draft's sizes: those of the manifest, or else the target's.

    Raises: ValueError for one that neither has, and for a draft that the target does not allow.
    """
    check_draft(draft, config)
    text = text_config(config)
    num_heads = draft.num_attention_heads or target.num_heads
    intermediate_size = draft.intermediate_size or text.get("intermediate_size")
    if intermediate_size is None:
        raise ValueError(
            "the target's config has no intermediate_size for the draft to take; set draft.intermediate_size"
        )
    return Shape(
        width=target.width,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=draft.num_key_value_heads or text.get("num_key_value_heads") or num_heads,
        head_dim=draft.head_dim or text.get("head_dim") or target.width // num_heads,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft.draft_vocab_size,
    )


def layer_matrices(shape: Shape) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of `fc` and of one decoder layer over two inputs: q, k, v, o, gate, up, down."""
    heads_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return (
        (shape.width, NUM_AUX_LAYERS * shape.width),
        *((rows, 2 * shape.width) for rows in (heads_width, kv_width, kv_width)),
        (shape.width, heads_width),
        *((shape.intermediate_size, shape.width) for _ in ("gate", "up")),
        (shape.width, shape.intermediate_size),
    )


def num_parameters(shape: Shape) -> int:
    """Trained weights, without the norms: those matrices, and the head."""
    return _num_weights(layer_matrices(shape)) + shape.width * shape.draft_vocab_size


def num_split_parameters(shape: Shape) -> int:
    """Of them, those that tensor parallelism splits: the layer's, without `fc`."""
    return _num_weights(layer_matrices(shape)[1:])


def num_muon_parameters(shape: Shape, training: TrainingConfig) -> int:
    """Of them, those that Muon trains; the others are AdamW's."""
    return _num_weights(layer_matrices(shape)) if training.optimizer == "muon" else 0


def _num_weights(matrices: Iterable[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in matrices)


def muon_flops(shape: Shape) -> float:
    """Of the Newton-Schulz steps of all matrices, in one step of the optimizer.

    With X of m rows and n >= m columns, each takes A = X X^T (2 m^2 n), b A + c A A (2 m^3), and that times X.
    """
    sizes = [(min(matrix), max(matrix)) for matrix in layer_matrices(shape)]
    return NEWTON_SCHULZ_STEPS * sum(4.0 * m**2 * n + 2 * m**3 for m, n in sizes)


def optimizer_bytes(shape: Shape, training: TrainingConfig, num_gpus: int = 1) -> float:
    """Of the optimizers' state on each of so many GPUs, which share that of AdamW."""
    by_muon = num_muon_parameters(shape, training)
    return MOMENT_BYTES * (2 * (num_parameters(shape) - by_muon) / num_gpus + by_muon)


def frozen_bytes(shape: Shape) -> int:
    """What training holds beside the trained weights: the target's embedding, and its head for the draft's tokens."""
    return COMPUTE_BYTES * shape.width * (shape.vocab_size + shape.draft_vocab_size)


def checkpoint_bytes(shape: Shape, training: TrainingConfig) -> float:
    """Of one checkpoint: float32 weights and the optimizers' state."""
    return MASTER_BYTES * num_parameters(shape) + optimizer_bytes(shape, training)


def feature_bytes(width: int, dtype: FeatureDtype, num_tokens: float, num_teaching: float) -> float:
    """Of stored features: the captured layers of each token, and the last hidden state where one teaches."""
    if dtype == "float8":
        vector = width * FLOAT8_BYTES + SCALE_BYTES
    else:
        vector = width * BYTES[dtype]
    by_token, by_teaching = NUM_AUX_LAYERS * vector + IDS_BYTES, vector + TEACHER_BYTES
    return num_tokens * by_token + num_teaching * by_teaching


def count_conversation(conversation: Conversation, num_steps: int) -> RowCounts:
    """The rows that a conversation adds to training, as `count_rows` counts them in a batch.

    An answer of `a` tokens from position s on supervises slots s-1 to s+a-3-i at step i, a-1-i of them: slot t reads
    token t+1+i and predicts t+2+i, both of the answer. The query of slot t at step i reads t + 1 + i keys.
    """
    rows = [0] * num_steps
    num_tokens = num_teachers = num_keys = 0
    for turn in conversation:
        start = num_tokens + turn.prompt
        # In a document that begins with its answer, the first token has no slot before it.
        first, answer = (start - 1, turn.answer) if start else (0, turn.answer - 1)
        num_tokens += turn.prompt + turn.answer
        num_teachers += max(0, answer - 1)
        for step in range(num_steps):
            count = max(0, answer - 1 - step)
            rows[step] += count
            num_keys += count * (first + 1 + step) + count * (count - 1) // 2
    return RowCounts(num_tokens, num_teachers, tuple(rows), num_keys)


def add_counts(counts: Iterable[RowCounts]) -> RowCounts:
    """The counts of conversations packed into one batch."""
    columns = list(zip(*counts, strict=True))
    tokens, teachers, rows, keys = columns
    return RowCounts(sum(tokens), sum(teachers), tuple(map(sum, zip(*rows, strict=True))), sum(keys))


def cut(conversation: Conversation, max_tokens: int) -> Conversation:
    """The first tokens of a conversation, as training cuts it."""
    kept: list[Turn] = []
    for turn in conversation:
        room = max_tokens - sum(map(sum, kept))
        prompt = min(turn.prompt, room)
        kept.append(Turn(prompt, min(turn.answer, room - prompt)))
    return tuple(turn for turn in kept if sum(turn))
