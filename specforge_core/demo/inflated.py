"""What an enlarged demo target says about itself, so that whatever is measured on it says so too. Torch-free."""

from pathlib import Path
from typing import NamedTuple

from specforge_core.facts import Record

INFLATED_NAME = "inflated.json"
"""In the folder of an enlarged target. No server or library reads it."""


class Shape(NamedTuple):
    """Sizes of a Llama-architecture model, under the names of its `config.json`."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int


class InflatedTarget(Record):
    """An enlarged demo target. Sizes go by their names in `config.json`."""

    demo: dict[str, int]
    enlarged: dict[str, int]
    layers: tuple[int, ...]
    """The enlarged layer that each of the demo's layers sits in."""
    num_parameters: int
    dtype: str
    max_position_embeddings: int

    def note(self) -> str:
        """What readers of figures about it have to know, as markdown."""
        sizes = ", ".join(f"{name} {size:,}" for name, size in self.enlarged.items())
        return (
            "**The text is the demo's, at the shape of a real model.** The target is SpecBundle's demo target, "
            f"enlarged to {self.num_parameters:,} parameters ({sizes}) without a change of what it computes. Rates and "
            "what a draft costs are those of a model of this shape; acceptance, and with it what a draft gains, is "
            "that of the demo's procedural text and says nothing about a real model."
        )

    def card(self) -> str:
        """The README.md of its folder."""
        rows = "\n".join(f"| {name} | {size} | {self.enlarged[name]} |" for name, size in self.demo.items())
        layers = ", ".join(f"{small}: {wide}" for small, wide in enumerate(self.layers))
        return CARD.format(
            rows=rows, layers=layers, num_parameters=self.num_parameters, added_first=self.demo["vocab_size"],
            dtype=self.dtype, max_positions=self.max_position_embeddings,
        )  # fmt: skip


def inflated_target(folder: Path) -> InflatedTarget | None:
    """What the target in this folder says about itself if it is an enlarged demo target, else None."""
    path = folder / INFLATED_NAME
    return InflatedTarget.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo target, enlarged

**The text is the demo's.** {num_parameters:,} parameters in {dtype} that compute the function of SpecBundle's demo
target of 7.5 M parameters, but for rounding: nothing is gained in quality. It exists to measure serving, capture and
training at the cost of a real model's shape; a report that uses it must say so. Made by
`python -m specforge_core.demo.inflate`, whose docstring has the construction.

| | demo | enlarged |
|---|---|---|
{rows}

Small layers sit in these layers (small: enlarged); the others hand their input on: {layers}.
Token ids from {added_first} on do not exist in the tokenizer and are never produced. Contexts end at {max_positions}
tokens, as the demo's do.
"""
