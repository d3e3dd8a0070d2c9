"""The demo target at a real model's shape: the same text, the memory traffic and arithmetic of the large model.

    python -m specforge_core.demo.inflate --shape llama-3.1-8b --out DIR

The enlarged model is an ordinary Llama checkpoint that computes the small model's function, exactly but for rounding,
so a whole build can be measured at real serving cost without a download. S is the small model's hidden width, W the
wide one's; V vocabulary and D width in tensor names.

* Width. The residual stream is padded with channels that nothing writes. `mean(x^2)` then divides by W, so every norm
  weight is multiplied by sqrt(S/W) and epsilon by S/W. Norm weights of padding are zero: what reads it meets zeros.
* Added tokens never win. The embedding writes a constant c into the first padding channel. It adds c^2/W to the
  mean square, which is taken out of epsilon: eps_wide = (eps S - c^2)/W > 0. All norms but the last give this channel
  weight zero; the last hands on c/sqrt(r^2 + eps), r the root mean square of the small residual, and the head row of
  an added token is -M there and meets zeros elsewhere. This suffices for EVERY input: r <= R by the triangle
  inequality over all that is written into the residual, with the operator norms of the weights
  (`residual_rms_bound`); a real logit is >= -B by Cauchy-Schwarz (`logit_bound`). With M = (B + 40) R / c (rounded
  up, far more than epsilon asks for) an added logit is at least 40 below any real one: 150 k added tokens together have
  less than 150 k e^-40 = 7e-13 of the probability. Averages of real rows would not win either, but they would take
  probability from sampling. The embedding of an added token is that of token (id mod small vocabulary), so that even
  prompts of random ids are prompts of the small model.
* Heads. RoPE turns pair (c, c + C/2) of a head of C channels by theta^(-2c/C) a position. Pair c of a small head
  becomes the pair of the wide head that has this frequency, c times the ratio of the widths. Queries carry the square
  root of that ratio, for the attention scale 1/sqrt(C), and are zero in the other pairs. Query heads go where
  grouped-query attention reads their KV head; a small group that is wider than a wide one gets copies of its KV head.
  Added heads and feed-forward units meet zero columns of o_proj and down_proj.
* Depth. Added layers have zero o_proj and down_proj, so they hand their input on. The layers that EAGLE-3 captures and
  the last one keep their roles (`place_layers`): 16 layers in 32 put outputs 1, 7, 12, 15 at 1, 15, 28, 31, the others
  evenly between. So a draft of the wide model gets the very features that a draft of the small one gets.

What is free, because it meets zeros, is noise and not zero: a GPU draws less power and clocks higher on zeros, so a
model of zeros would be served faster than a real one. Most of o_proj, down_proj and of the hidden channels has to be
zero all the same.

A draft model of the wide target should keep `draft_vocab_size` within the small vocabulary: an added row starts as -M
times a channel that a fresh draft fills with noise.
"""

import argparse
import json
import logging
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.linalg import matrix_norm
from transformers import LlamaConfig

from specforge_core.demo.inflated import INFLATED_NAME, InflatedTarget, Shape
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.progress import progress

logger = logging.getLogger(__name__)

DEMO_TARGET = Path(__file__).parent / "target"
CACHE = Path("~/.cache/specbundle")
"""Where `inflated_manifest.yaml` looks for the enlarged target."""
COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
"""Not float16: the head rows of added tokens are beyond its range."""
LOGIT_MARGIN_NATS = 40.0
"""How far every added token's logit is below every real one's."""
NUM_THREADS = 8
NOISE_STD = 0.02
"""The usual standard deviation of fresh Llama weights."""


SHAPES = {
    "llama-3.1-8b": Shape(4096, 32, 14_336, 32, 8, 128, 128_256),
    # Qwen3-8B's sizes without its norms of queries and keys: still the Llama architecture.
    "qwen3-8b-like": Shape(4096, 36, 12_288, 32, 8, 128, 151_936),
}


class HeadRows(NamedTuple):
    """Which rows of the wide q/k/v projections hold which of the small ones: int64, `_wide` and `_small` in pairs."""

    query_wide: Tensor
    query_small: Tensor
    kv_wide: Tensor
    kv_small: Tensor
    used_query_heads: Tensor
    """Wide query heads that hold a small one."""


def place_layers(num_small: int, num_wide: int) -> tuple[int, ...]:
    """The wide layer that is small layer i, for each i: captured layers at captured layers, the last one last.

    Example: 16 in 32 are (0, 1, 3, 5, 8, 10, 12, 15, 17, 20, 22, 25, 28, 29, 30, 31).
    Raises: ValueError for fewer wide layers, or too few to have EAGLE-3's three captured layers.
    """
    if num_wide < num_small:
        raise ValueError(f"num_hidden_layers={num_wide} is too few for the small model; choose at least {num_small}")
    anchors_small = (-1, *Eagle3Draft.capture_layers(None, num_small), num_small - 1)
    anchors_wide = (-1, *Eagle3Draft.capture_layers(None, num_wide), num_wide - 1)
    placed: list[int] = []
    for (start, end), (wide_start, wide_end) in zip(pairwise(anchors_small), pairwise(anchors_wide), strict=True):
        span, wide_span = end - start, wide_end - wide_start
        placed += [wide_start + i * wide_span // span for i in range(1, span + 1)]
    assert len(set(placed)) == num_small, "two small layers in one place"
    return tuple(placed)


def place_heads(small: Shape, wide: Shape) -> HeadRows:
    """Where the rows of the small heads go.

    Raises: ValueError if the wide heads lack the small one's RoPE frequencies, or are too few.
    """
    if wide.head_dim % small.head_dim:
        raise ValueError(
            f"head_dim={wide.head_dim} lacks the RoPE frequencies of heads of {small.head_dim}; "
            f"choose a multiple of {small.head_dim}"
        )
    group_small = small.num_attention_heads // small.num_key_value_heads
    group_wide = wide.num_attention_heads // wide.num_key_value_heads
    if wide.num_attention_heads % wide.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads={wide.num_attention_heads} is no multiple of "
            f"num_key_value_heads={wide.num_key_value_heads}; choose one"
        )
    num_copies = math.ceil(group_small / group_wide)
    if small.num_key_value_heads * num_copies > wide.num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads={wide.num_key_value_heads} of {group_wide} query heads each is too few for "
            f"{small.num_key_value_heads} of {group_small}; choose at least {small.num_key_value_heads * num_copies}"
        )
    pair = torch.arange(small.head_dim // 2) * (wide.head_dim // small.head_dim)
    channel_wide = torch.cat([pair, pair + wide.head_dim // 2])
    channel_small = torch.arange(small.head_dim)
    query_small = torch.arange(small.num_attention_heads)
    kv_head, member = query_small // group_small, query_small % group_small
    query_wide = (kv_head * num_copies + member // group_wide) * group_wide + member % group_wide
    kv_wide = torch.arange(small.num_key_value_heads * num_copies)
    return HeadRows(
        query_wide=(query_wide[:, None] * wide.head_dim + channel_wide).flatten(),
        query_small=(query_small[:, None] * small.head_dim + channel_small).flatten(),
        kv_wide=(kv_wide[:, None] * wide.head_dim + channel_wide).flatten(),
        kv_small=((kv_wide // num_copies)[:, None] * small.head_dim + channel_small).flatten(),
        used_query_heads=query_wide,
    )


def residual_rms_bound(weights: dict[str, Tensor], config: LlamaConfig) -> float:
    """R: no input makes the root mean square of the small model's last residual larger than this.

    A norm's output without its weight has length at most sqrt(h); attention averages values; |silu(x)| <= |x|.
    """
    width, length = config.hidden_size, weights["model.embed_tokens.weight"].norm(dim=1).max()
    for index in range(config.num_hidden_layers):
        layer = {name: weights[f"model.layers.{index}.{name}.weight"] for name in LAYER_WEIGHTS}
        value = layer["self_attn.v_proj"] * layer["input_layernorm"]
        gate = layer["mlp.gate_proj"] * layer["post_attention_layernorm"]
        up = layer["mlp.up_proj"] * layer["post_attention_layernorm"]
        values = math.sqrt(config.num_attention_heads * width) * matrix_norm(value, 2)
        units = math.sqrt(width) * matrix_norm(gate, 2) * math.sqrt(width) * up.norm(dim=1).max()
        length = length + matrix_norm(layer["self_attn.o_proj"], 2) * values
        length = length + matrix_norm(layer["mlp.down_proj"], 2) * units
    return float(length) / math.sqrt(width)


def logit_bound(head_VD: Tensor, final_norm_D: Tensor) -> float:
    """B: no input makes a logit of the small model larger than this, or smaller than its negative."""
    return math.sqrt(final_norm_D.numel()) * float((head_VD * final_norm_D).norm(dim=1).max())


LAYER_WEIGHTS = (
    "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
).split()


class Inflation:
    """The tensors of the wide model, made one group at a time; only the small model is held, in float64.

    Groups may be made by several threads at once: each has noise of its own seed.
    """

    def __init__(self, shape: Shape, *, dtype: torch.dtype, source: Path = DEMO_TARGET) -> None:
        """Raises: ValueError for a shape that cannot hold the small model, naming the way out."""
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype={dtype} cannot hold the rows of added tokens; choose one of {sorted(DTYPES)}")
        self.small_config = LlamaConfig.from_pretrained(source)
        _require_plain_llama(self.small_config)
        self.small = Shape(*(getattr(self.small_config, name) for name in Shape._fields))
        self.wide, self.dtype = shape, dtype
        has_added_tokens = shape.vocab_size > self.small.vocab_size
        lower_limits = {
            "hidden_size": self.small.hidden_size + has_added_tokens,
            "intermediate_size": self.small.intermediate_size,
            "vocab_size": self.small.vocab_size,
        }
        for name, limit in lower_limits.items():
            if getattr(shape, name) < limit:
                raise ValueError(f"{name}={getattr(shape, name)} cannot hold the small model; choose at least {limit}")
        self.heads = place_heads(self.small, shape)
        if shape.hidden_size % shape.num_attention_heads:
            # transformers refuses such a config, though head_dim is given.
            raise ValueError(
                f"hidden_size={shape.hidden_size} is no multiple of {shape.num_attention_heads} query heads"
            )
        self.layers = place_layers(self.small.num_hidden_layers, shape.num_hidden_layers)
        self.weights = {name: weight.double() for name, weight in load_file(source / "model.safetensors").items()}
        if self.small_config.tie_word_embeddings:
            self.weights["lm_head.weight"] = self.weights["model.embed_tokens.weight"]
        self.norm_scale = math.sqrt(self.small.hidden_size / shape.hidden_size)
        epsilon_sum = self.small_config.rms_norm_eps * self.small.hidden_size
        # A power of two is exact in every dtype, and half of epsilon is left for a residual of zeros.
        self.constant = 2.0 ** math.floor(math.log2(epsilon_sum / 2) / 2) if has_added_tokens else 0.0
        self.rms_norm_eps = (epsilon_sum - self.constant**2) / shape.hidden_size

    def config(self) -> LlamaConfig:
        """The wide model's config: the small one's, with the shape. Its head is its own, not tied."""
        changed = {"rms_norm_eps": self.rms_norm_eps, "tie_word_embeddings": False, "dtype": self.dtype}
        return LlamaConfig.from_dict(self.small_config.to_dict() | self.wide._asdict() | changed)

    @property
    def num_groups(self) -> int:
        """The embedding, one for each layer, and the final norm with the head."""
        return self.wide.num_hidden_layers + 2

    def record(self, *, num_parameters: int) -> InflatedTarget:
        """What the wide model's folder says about it."""
        return InflatedTarget(
            demo=self.small._asdict(),
            enlarged=self.wide._asdict(),
            layers=self.layers,
            num_parameters=num_parameters,
            dtype=str(self.dtype).removeprefix("torch."),
            max_position_embeddings=self.small_config.max_position_embeddings,
        )

    def group(self, number: int) -> dict[str, Tensor]:
        """The tensors of one group, by name."""
        generator = torch.Generator().manual_seed(number)
        if number == 0:
            return {"model.embed_tokens.weight": self._embedding()}
        if number <= self.wide.num_hidden_layers:
            index = number - 1
            small_index = self.layers.index(index) if index in self.layers else None
            layer = self._layer(small_index, generator)
            return {f"model.layers.{index}.{name}.weight": weight for name, weight in layer.items()}
        final_norm = self._norm(self.weights["model.norm.weight"])
        if self.constant:
            final_norm[self.small.hidden_size] = self.norm_scale
        return {"model.norm.weight": final_norm, "lm_head.weight": self._head(generator)}

    def _zeros(self, *sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=self.dtype)

    def _noise(self, generator: torch.Generator, *sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=self.dtype).normal_(std=NOISE_STD, generator=generator)

    def _norm(self, weight_D: Tensor) -> Tensor:
        padded = self._zeros(self.wide.hidden_size)
        padded[: self.small.hidden_size] = (weight_D * self.norm_scale).to(self.dtype)
        return padded

    def _embedding(self) -> Tensor:
        small_VD, width = self.weights["model.embed_tokens.weight"].to(self.dtype), self.small.hidden_size
        wide = self._zeros(self.wide.vocab_size, self.wide.hidden_size)
        wide[:, :width] = small_VD[torch.arange(self.wide.vocab_size) % self.small.vocab_size]
        wide[:, width : width + 1] = self.constant
        return wide

    def _head(self, generator: torch.Generator) -> Tensor:
        num_real, width = self.small.vocab_size, self.small.hidden_size
        small_VD = self.weights["lm_head.weight"]
        wide = self._noise(generator, self.wide.vocab_size, self.wide.hidden_size)
        wide[:num_real, :width] = small_VD.to(self.dtype)
        if self.constant:
            wide[num_real:, :width] = 0
            wide[:num_real, width] = 0
            bound = logit_bound(small_VD, self.weights["model.norm.weight"]) + LOGIT_MARGIN_NATS
            magnitude = bound * residual_rms_bound(self.weights, self.small_config) / self.constant
            # Rounded up to a power of two: exact in every dtype, and room for the rounding of a running model.
            wide[num_real:, width] = -(2.0 ** math.ceil(math.log2(magnitude)))
        return wide

    def _layer(self, small_index: int | None, generator: torch.Generator) -> dict[str, Tensor]:
        """One decoder layer by the names of LAYER_WEIGHTS: small layer `small_index`, or one that changes nothing."""
        wide, width = self.wide, self.small.hidden_size
        num_query_rows = wide.num_attention_heads * wide.head_dim
        num_kv_rows = wide.num_key_value_heads * wide.head_dim
        layer = {
            "input_layernorm": self._norm(torch.ones(width)),
            "self_attn.q_proj": self._noise(generator, num_query_rows, wide.hidden_size),
            "self_attn.k_proj": self._noise(generator, num_kv_rows, wide.hidden_size),
            "self_attn.v_proj": self._noise(generator, num_kv_rows, wide.hidden_size),
            "self_attn.o_proj": self._zeros(wide.hidden_size, num_query_rows),
            "post_attention_layernorm": self._norm(torch.ones(width)),
            "mlp.gate_proj": self._noise(generator, wide.intermediate_size, wide.hidden_size),
            "mlp.up_proj": self._noise(generator, wide.intermediate_size, wide.hidden_size),
            "mlp.down_proj": self._zeros(wide.hidden_size, wide.intermediate_size),
        }
        if small_index is None:
            return layer
        small = {name: self.weights[f"model.layers.{small_index}.{name}.weight"] for name in LAYER_WEIGHTS}
        for name in ("input_layernorm", "post_attention_layernorm"):
            layer[name] = self._norm(small[name])
        # A small head's queries are zero where it has no channels, so keys may hold noise there.
        heads = self.heads
        layer["self_attn.q_proj"].unflatten(0, (-1, wide.head_dim))[heads.used_query_heads] = 0
        query = small["self_attn.q_proj"] * math.sqrt(wide.head_dim / self.small.head_dim)
        layer["self_attn.q_proj"][heads.query_wide, :width] = query[heads.query_small].to(self.dtype)
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            layer[name][heads.kv_wide, :width] = small[name][heads.kv_small].to(self.dtype)
        output = small["self_attn.o_proj"][:, heads.query_small]
        layer["self_attn.o_proj"][:width, heads.query_wide] = output.to(self.dtype)
        num_units = self.small.intermediate_size
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            layer[name][:num_units, :width] = small[name].to(self.dtype)
        layer["mlp.down_proj"][:width, :num_units] = small["mlp.down_proj"].to(self.dtype)
        return layer


def _require_plain_llama(config: LlamaConfig) -> None:
    """Raises: ValueError for what the enlargement does not know: biases, scaled RoPE, another activation."""
    known = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "model_type": "llama"}
    for name, value in known.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)!r} cannot be enlarged; the small model must have {value!r}"
            )
    if config.rope_parameters["rope_type"] != "default":
        raise ValueError(f"rope_type={config.rope_parameters['rope_type']!r} cannot be enlarged; only 'default' can")


def inflate(shape: Shape, out: Path, *, dtype: torch.dtype, source: Path = DEMO_TARGET) -> Inflation:
    """What was written to `out`: a Hugging Face checkpoint, one shard for each layer; NUM_THREADS layers are in memory.

    `out` appears when it is whole.
    Raises: ValueError for a shape that cannot hold the small model; FileExistsError if `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder or delete it")
    inflation = Inflation(shape, dtype=dtype, source=source)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    num_shards = inflation.num_groups
    shard_of: dict[str, str] = {}
    size_bytes = 0

    def write(number: int) -> dict[str, int]:
        """Bytes by tensor name."""
        group = inflation.group(number)
        save_file(group, partial / _shard_name(number, num_shards), metadata={"format": "pt"})
        return {name: weight.nbytes for name, weight in group.items()}

    # Drawing the noise takes most of the time, and a thread each.
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        written = pool.map(write, range(num_shards))
        for number, sizes in enumerate(progress(written, desc="write", total=num_shards, unit="shard")):
            shard_of |= dict.fromkeys(sizes, _shard_name(number, num_shards))
            size_bytes += sum(sizes.values())
    index = {"metadata": {"total_size": size_bytes}, "weight_map": shard_of}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    inflation.config().save_pretrained(partial)
    for name in COPIED_FILES:
        shutil.copy(source / name, partial / name)
    record = inflation.record(num_parameters=size_bytes // dtype.itemsize)
    (partial / INFLATED_NAME).write_text(record.model_dump_json(indent=2) + "\n")
    (partial / "README.md").write_text(record.card())
    partial.rename(out)
    logger.info("wrote %s: %d shards, %.2f GiB", out, num_shards, size_bytes / 2**30)
    return inflation


def _shard_name(number: int, num_shards: int) -> str:
    return f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description="Enlarge the demo target to a real model's shape.")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--out", type=Path, help=f"folder of the checkpoint; default: {CACHE}/demo-SHAPE")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    out = args.out or CACHE.expanduser() / f"demo-{args.shape}"
    inflate(SHAPES[args.shape], out, dtype=DTYPES[args.dtype])


if __name__ == "__main__":
    main()
