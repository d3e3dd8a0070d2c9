"""A target's `config.json` alone: from its folder, from the Hub, or from the sizes that ship. Torch-free."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from specforge_core.manifest_sections import TargetConfig
from specforge_core.resolve import DEFAULT_BRANCH, local_path

CONFIG_NAME = "config.json"
FACTS_NAME = "hub_facts.json"
HUB_TIMEOUT_S = 5.0


class FoundConfig(NamedTuple):
    """A config, and where it is from."""

    values: dict[str, Any]
    source: str
    """In words."""


@cache
def hub_facts() -> dict[str, Any]:
    """The sizes of public targets and data sets that ship with the package."""
    facts: dict[str, Any] = json.loads((files(__package__) / FACTS_NAME).read_text(encoding="utf-8"))
    return facts


class ConfigReader:
    """Reads configs; a Hub that did not answer once is not asked again."""

    def __init__(self, base_dir: Path, recorded: Mapping[str, dict[str, Any]] | None = None) -> None:
        """Args: base_dir: the manifest's folder; recorded: configs of targets that need not be there any more."""
        self._base_dir = base_dir
        self._recorded = recorded or {}
        self._hub_error = ""
        self._is_unreachable = False

    def read(self, target: TargetConfig) -> FoundConfig:
        """The target's config. Raises: ValueError if it is in no folder, not on the Hub and none of those that ship."""
        found = self.find(target)
        if found is None:
            raise ValueError(
                f"the Hub gives no config.json of {target.model} ({self._hub_error}), and its sizes are none of those "
                "that ship; name a folder that has it"
            )
        return found

    def find(self, target: TargetConfig) -> FoundConfig | None:
        """The target's config; None if the Hub gives none and its sizes do not ship.

        Raises: ValueError for a folder without one.
        """
        if target.model in self._recorded:
            return FoundConfig(self._recorded[target.model], "sizes that were recorded with its build")
        folder = local_path(target.model, self._base_dir)
        if folder is not None:
            path = folder / CONFIG_NAME
            if not path.is_file():
                raise ValueError(f"target {target.model}: there is no {path}; name a folder that has one, or a Hub id")
            return FoundConfig(json.loads(path.read_text(encoding="utf-8")), "config.json of its folder")
        if found := self._from_hub(target):
            return found
        shipped = hub_facts()["configs"].get(target.model)
        if shipped is None:
            return None
        return FoundConfig(shipped, f"sizes that ship with this program, as the Hub gives none ({self._hub_error})")

    def _from_hub(self, target: TargetConfig) -> FoundConfig | None:
        """One request without retries: a plan must not wait for a network that is not there."""
        # Importing it takes a second, and targets of local folders need it not.
        from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import HTTPError
        from huggingface_hub.utils import build_hf_headers

        revision = target.revision or DEFAULT_BRANCH
        cached = try_to_load_from_cache(target.model, CONFIG_NAME, revision=revision)
        if isinstance(cached, str):
            return FoundConfig(json.loads(Path(cached).read_text(encoding="utf-8")), "config.json in the Hub's cache")
        if self._is_unreachable:
            return None
        url = hf_hub_url(target.model, CONFIG_NAME, revision=revision)
        try:
            answer = get_session().get(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT_S, follow_redirects=True)
        except (HTTPError, OSError) as error:
            self._is_unreachable, self._hub_error = True, f"it cannot be reached: {error}"
            return None
        if not answer.is_success:
            self._hub_error = f"status {answer.status_code}; a gated model needs HF_TOKEN"
            return None
        return FoundConfig(answer.json(), "config.json on the Hub")
