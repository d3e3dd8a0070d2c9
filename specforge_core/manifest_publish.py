"""The section `publish` of a manifest entry. Torch-free."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from specforge_core.manifest_errors import cross_field_error
from specforge_core.manifest_sections import REPOSITORY_PATTERN, Config

PublishTo = Literal["directory", "hub"]
Destination = Literal["directory", "hub", "none"]
"""Of one build."""

# Of the Hub, as `huggingface_hub.utils.validate_repo_id` checks it too.
MAX_REPOSITORY_CHARACTERS = 96
# A collection's namespace, its title in lower case, and 24 digits.
COLLECTION_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]*/[a-z0-9-]+-[0-9a-f]{24}"


def _check_repository(repository: str) -> str:
    if not re.fullmatch(REPOSITORY_PATTERN, repository):
        raise ValueError(f'"{repository}" should be a Hub id, organization/name')
    if ".." in repository or "--" in repository or repository.endswith((".git", ".", "-")):
        raise ValueError(f'"{repository}" is no Hub id: none has ".." or "--" in it, or ".git", "." or "-" at its end')
    if len(repository) > MAX_REPOSITORY_CHARACTERS:
        raise ValueError(
            f'"{repository}" has {len(repository)} characters, a Hub id at most {MAX_REPOSITORY_CHARACTERS}; shorten it'
        )
    return repository


def _check_collection(collection: str) -> str:
    if "/" in collection and not re.fullmatch(COLLECTION_PATTERN, collection):
        raise ValueError(
            f'"{collection}" should be the title of a collection, without "/", or a whole slug such as '
            "organization/my-drafts-0123456789abcdef01234567"
        )
    return collection


def _check_directory(directory: str) -> str:
    if ".." in PurePosixPath(directory).parts:
        raise ValueError(f'"{directory}" leaves the store; name a folder in it, or an absolute path')
    return directory


Repository = Annotated[str, AfterValidator(_check_repository)]


class PublishConfig(Config):
    """Where a draft that passed its gates goes. Its repository is a folder in any case."""

    to: PublishTo = "directory"
    """`hub`: the Hub's repository then becomes what the folder is, in one commit."""
    directory: Annotated[str, Field(min_length=1), AfterValidator(_check_directory)] = "published"
    """Folder that holds one repository folder per entry; relative to the store's root."""
    repository: Repository | None = None
    """Hub id of the draft (`org/name`); also names the repository in the model card."""
    private: bool = False
    """Of what is made on the Hub. A repository that is there already and public is refused if this is true."""
    license: str = "apache-2.0"
    collection: Annotated[str, Field(min_length=1), AfterValidator(_check_collection)] | None = None
    """Title or slug of the Hub's collection that lists the draft, with what was measured as a note. One that is named
    by a title is made in the repository's namespace if there is none."""
    dataset: Repository | None = None
    """Hub id of a data set with the regenerated conversations; they stay here when absent."""

    @model_validator(mode="after")
    def _hub_needs_a_repository(self) -> "PublishConfig":
        if self.to == "hub" and self.repository is None:
            raise cross_field_error(("repository",), "is needed for `to: hub`; name it as organization/name")
        return self
