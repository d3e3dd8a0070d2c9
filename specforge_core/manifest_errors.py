"""Everything that is wrong in a manifest, with file, line, entry, key, value and way out. Torch-free."""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from specforge_core import manifest_yaml
from specforge_core.manifest_yaml import Document, Node, Problem

CROSS_FIELD = "cross_field"
MAX_VALUE_CHARACTERS = 80
# Where pydantic speaks of JSON to a reader who wrote YAML.
WORDING = {
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "string_type": "should be a text (quote it)",
    "tuple_type": "should be a list",
    "model_type": "should be a section of keys and values",
    "too_short": "should not be empty",
}


class ManifestError(ValueError):
    """A manifest that cannot be used; its text has one line per problem."""

    def __init__(self, file: Path, problems: Sequence[Problem]) -> None:
        super().__init__(file, problems)
        self.file = file
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line or 0))

    def __str__(self) -> str:
        return "\n".join(self._line(problem) for problem in self.problems)

    def _line(self, problem: Problem) -> str:
        place = str(self.file) if problem.line is None else f"{self.file}:{problem.line}"
        return ": ".join(part for part in (place, problem.where, _dotted(problem.path), problem.message) if part)


def cross_field_error(path: manifest_yaml.Path, message: str) -> PydanticCustomError:
    """The error of a check over several fields. Args: path: to the one to point at; message: shown as it is."""
    return PydanticCustomError(CROSS_FIELD, "{message}", {"path": path, "message": message})


def read_document(file: Path) -> Document:
    """The YAML of a file, with places. Raises: ManifestError if there is nothing to validate."""
    try:
        document = manifest_yaml.compose(file.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise ManifestError(file, [Problem(None, (), f"there is no such file in {file.parent.absolute()}")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(file, [Problem(None, (), f"cannot be read as UTF-8 text: {error}")]) from None
    if document.root is None:
        raise ManifestError(file, document.problems)
    return document


def problems_in(
    document: Document, merged: Node, error: ValidationError | None, model: type[BaseModel]
) -> list[Problem]:
    """Every problem of a manifest, each once, however many entries a wrong default reaches.

    Args: document: the file as it stands; merged: its root with the defaults in every entry; error: of validating that
    as a `model`, None if it is valid.
    """
    assert document.root is not None
    entries = merged.deepest(("entries",)).children()
    names = [_entry_name(i, entry) for i, entry in enumerate(entries)]
    defaults = document.root.child("defaults")
    found = [_attributed(problem, names) for problem in (*document.problems, *_repeated_names(entries))]
    if defaults and not isinstance(defaults.value, dict):
        found.append(Problem(defaults.line, ("defaults",), WORDING["model_type"]))
    if defaults and (name := defaults.child("name")):
        found.append(Problem(name.line, ("name",), "belongs to each entry", "defaults"))

    reached: dict[tuple[Problem, bool], list[str]] = {}
    for details in error.errors(include_url=False) if error else ():
        if details["type"] == "too_short" and len(details["input"]) >= details["ctx"]["min_length"]:
            # Its items are wrong, and reported one by one.
            continue
        path = details["loc"]
        if details["type"] == CROSS_FIELD:
            path = (*path, *details["ctx"]["path"])
        node = merged.deepest(path)
        problem = _attributed(Problem(node.line, path, _message(details, model)), names)
        if defaults and defaults.contains(node):
            # A check over several fields may find a default at odds with what an entry says.
            is_all_default = defaults.contains(merged.deepest(details["loc"]))
            reached.setdefault((problem._replace(where="defaults"), is_all_default), []).append(problem.where)
        else:
            found.append(problem)
    num_merged = sum(isinstance(entry.value, dict) for entry in entries)
    for (problem, is_all_default), hit in reached.items():
        is_general = is_all_default and len(hit) == num_merged
        found.append(problem if is_general else problem._replace(where=f"defaults, as used by {', '.join(hit)}"))
    return found


def _entry_name(i: int, entry: Node) -> str:
    name = entry.child("name")
    return f'entry "{name.value}"' if name and isinstance(name.value, str) else f"entry number {i + 1}"


def _attributed(problem: Problem, names: Sequence[str]) -> Problem:
    match problem.path:
        case ("entries", int(i), *rest):
            return problem._replace(where=names[i], path=tuple(rest))
        case ("defaults", *rest):
            return problem._replace(where="defaults", path=tuple(rest))
    return problem


def _repeated_names(entries: Sequence[Node]) -> Iterator[Problem]:
    first_lines: dict[str, int] = {}
    for i, entry in enumerate(entries):
        name = entry.child("name")
        if name is None or not isinstance(name.value, str):
            continue
        if name.value in first_lines:
            message = (
                f'"{name.value}" is the name of the entry on line {first_lines[name.value]} already; choose another'
            )
            yield Problem(name.line, ("entries", i, "name"), message)
        first_lines.setdefault(name.value, name.line)


def _dotted(path: manifest_yaml.Path) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".")


def _message(details: ErrorDetails, model: type[BaseModel]) -> str:
    kind, path = details["type"], details["loc"]
    if kind == "extra_forbidden":
        *parent, key = path
        known = [*_model_at(model, parent).model_fields, *(["defaults"] if not parent else [])]
        nearest = difflib.get_close_matches(str(key), known, n=1)
        return f'unknown key; did you mean "{nearest[0]}"?' if nearest else f"unknown key; known: {', '.join(known)}"
    if kind == "missing":
        return "is required, and stands neither in the entry nor in the defaults"
    if kind in (CROSS_FIELD, "value_error"):
        return details["msg"].removeprefix("Value error, ")
    return f"{WORDING.get(kind) or details['msg'].removeprefix('Input ')}, got {_shown(details['input'])}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[:MAX_VALUE_CHARACTERS] + "..."


def _model_at(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    for step in path:
        if isinstance(step, str):
            model = next(_models_in(model.model_fields[step].annotation))
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
