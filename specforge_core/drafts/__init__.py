"""Draft algorithms by the name that the manifest uses."""

from specforge_core.drafts.base import DraftModel
from specforge_core.drafts.eagle3 import Eagle3Draft

ALGORITHMS: dict[str, type[DraftModel]] = {"eagle3": Eagle3Draft}
