"""What a target allows its draft: said by `plan` before a build begins, and by the stages that need it. Torch-free."""

from collections.abc import Mapping
from typing import Any

from specforge_core.manifest_sections import DraftConfig

NUM_AUX_LAYERS = 3


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the language model in a `config.json`, which may be that of one that sees and hears, too."""
    return {**config, **config.get("text_config", {})}


def check_draft(draft: DraftConfig, target_config: Mapping[str, Any]) -> None:
    """Return if the target of this `config.json` allows the draft; a size that it leaves out is left to the stages.

    Raises: ValueError as the stages `vocabulary` and `capture` would.
    """
    text = text_config(target_config)
    if (vocab_size := text.get("vocab_size")) is not None:
        check_draft_vocab_size(draft.draft_vocab_size, vocab_size)
    if (num_layers := text.get("num_hidden_layers")) is not None:
        eagle3_layers(draft.aux_layers, num_layers)


def check_draft_vocab_size(draft_vocab_size: int, target_vocab_size: int) -> None:
    """Return if the target has so many tokens. Raises: ValueError otherwise."""
    if draft_vocab_size > target_vocab_size:
        raise ValueError(
            f"draft_vocab_size={draft_vocab_size} is more than the target's {target_vocab_size} tokens; lower it"
        )


def eagle3_layers(aux_layers: tuple[int, ...] | None, num_target_layers: int) -> tuple[int, ...]:
    """The layers given, or [1, N//2 - 1, N - 4] of N. Raises: ValueError if these are not three ascending ones."""
    layers = aux_layers or (1, num_target_layers // 2 - 1, num_target_layers - 4)
    # The server captures layer INPUTS, so the output of the last layer is out of its reach.
    in_reach = all(0 <= layer < num_target_layers - 1 for layer in layers)
    if len(layers) != NUM_AUX_LAYERS or list(layers) != sorted(set(layers)) or not in_reach:
        raise ValueError(
            f"EAGLE-3 reads the outputs of {NUM_AUX_LAYERS} ascending layers from 0 to {num_target_layers - 2} "
            f"of a target of {num_target_layers} layers, not {list(layers)}; set draft.aux_layers"
        )
    return tuple(layers)
