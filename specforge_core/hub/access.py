"""Whether a token may write where an entry publishes: asked before the first stage, not after the last. Torch-free."""

import logging
from typing import Any

from specforge_core.hub.client import Hub
from specforge_core.hub.upload import Repository, repository_head

logger = logging.getLogger(__name__)

READING_ROLES = ("read", None)


def check_write_access(hub: Hub, repository: Repository) -> str:
    """The name of the token's owner, who may write this repository as far as the Hub tells.

    Raises: ValueError if not, or if it should be private and is public; as `Hub.call`.
    """
    owner = hub.call("asking whose token this is", hub.api.whoami)
    name, namespace = owner["name"], repository.name.partition("/")[0]
    token: dict[str, Any] = owner.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise ValueError(
            f"the token of {name} may only read, and {repository.title} is to be written; make one that may write at "
            f"{hub.endpoint}/settings/tokens"
        )
    roles = {name: "admin", **{org["name"]: org.get("roleInOrg") for org in owner.get("orgs", ())}}
    if namespace not in roles:
        raise ValueError(
            f"the token of {name} may write under {', '.join(roles)}, and {repository.title} is not; change `publish` "
            f"of the entry, or ask {namespace} to be let in"
        )
    if roles[namespace] in READING_ROLES:
        raise ValueError(f"{name} may only read in {namespace}; ask for the right to write {repository.title}")
    if token.get("role") == "fineGrained" and not _may_write(token, (namespace, repository.name)):
        # Its permissions are many and change; the Hub has the last word.
        logger.warning(
            "the fine-grained token of %s names no permission to write %s; the upload may be refused",
            name,
            repository.title,
        )
    hub.call(f"reading {repository.title}", lambda: repository_head(hub, repository))
    return str(name)


def _may_write(token: dict[str, Any], names: tuple[str, ...]) -> bool:
    scopes = token.get("fineGrained", {}).get("scoped", ())
    return any(
        scope["entity"].get("name") in names and any("write" in permission for permission in scope["permissions"])
        for scope in scopes
    )
