"""YAML with the place of every key and value, so that an error can name its line. Torch-free.

Reads YAML 1.2's core schema: `no` is a text and `1e-4` a number, unlike PyYAML's default. Aliases are refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import yaml

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    # No leading zero, which PyYAML would take for base 8.
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}

Path = tuple[str | int, ...]
"""Keys and indices from the root to a value."""


class Problem(NamedTuple):
    """One thing that is wrong in a file."""

    line: int | None
    """Counted from 1; None if it is about the file as a whole."""
    path: Path
    message: str
    where: str = ""
    """The part of the file that `path` starts at, for people; empty for the root."""


@dataclass(frozen=True)
class Node:
    """A value and its place. A mapping holds nodes by key, a list holds nodes."""

    value: Any
    line: int
    """Of the key if it has one, counted from 1."""
    column: int
    """Of the key if it has one, counted from 0."""
    start: int
    """Offset of the value in the text."""
    end: int
    in_braces: bool = False
    """Whether it stands in a `{...}`."""

    def child(self, step: str | int) -> "Node | None":
        """The value under a key or an index, None if there is none."""
        if isinstance(self.value, dict):
            return self.value.get(step)
        if isinstance(self.value, list) and isinstance(step, int) and step < len(self.value):
            return self.value[step]
        return None

    def children(self) -> list["Node"]:
        """The items of a list; empty if the value is none."""
        return self.value if isinstance(self.value, list) else []

    def deepest(self, path: Path) -> "Node":
        """The value at a path, or the last one on the way that exists."""
        node = self
        for step in path:
            child = node.child(step)
            if child is None:
                break
            node = child
        return node

    def contains(self, other: "Node") -> bool:
        """Whether the other one is written inside this one."""
        return self.start <= other.start < self.end

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


class Document(NamedTuple):
    """What a text holds, and what is wrong with it as YAML."""

    root: Node | None
    """None if the text is no YAML, or empty."""
    problems: list[Problem]


def merged(base: Node, over: Node) -> Node:
    """`over`, with what it leaves out taken from `base`: mappings are merged at every depth, lists are replaced."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    both = {key: merged(base.value[key], node) if key in base.value else node for key, node in over.value.items()}
    return replace(over, value={**base.value, **both})


def compose(text: str) -> Document:
    """The document in a text, with every problem that shows without knowing which keys are allowed."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return Document(None, [Problem(mark.line + 1 if mark else None, (), f"is no valid YAML: {error.problem}")])
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"is no valid YAML: the character with code {error.character} is not allowed"
        return Document(None, [Problem(line, (), message)])
    if node is None:
        return Document(None, [Problem(1, (), "is empty; it needs `version: 1` and `entries:`")])
    problems: list[Problem] = []
    return Document(_located(loader, node, (), problems), problems)


class _Loader(yaml.SafeLoader):
    # Under None: whatever the first character is.
    yaml_implicit_resolvers = {  # noqa: RUF012
        None: [(_TAG + name, re.compile(rf"(?:{pattern})\Z")) for name, pattern in _CORE_SCHEMA.items()]
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not supported, use `defaults`", mark)
        return super().compose_node(parent, index)


def _located(loader: _Loader, node: yaml.Node, path: Path, problems: list[Problem]) -> Node:
    start = node.start_mark
    value: Any = None
    if isinstance(node, yaml.MappingNode):
        value = dict(_items(loader, node, path, problems))
    elif isinstance(node, yaml.SequenceNode):
        value = [_located(loader, item, (*path, i), problems) for i, item in enumerate(node.value)]
    else:
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        own_tag = loader.resolve(yaml.ScalarNode, node.value, (is_plain, not is_plain))
        if node.tag != own_tag:
            problems.append(Problem(start.line + 1, path, f"the tag {node.tag} is not allowed here; remove it"))
        value = loader.construct_object(yaml.ScalarNode(own_tag, node.value))
    return Node(value, line=start.line + 1, column=start.column, start=start.index, end=node.end_mark.index)


def _items(
    loader: _Loader, mapping: yaml.MappingNode, path: Path, problems: list[Problem]
) -> Iterator[tuple[str, Node]]:
    first_lines: dict[str, int] = {}
    for key_node, value_node in mapping.value:
        place, key = key_node.start_mark, key_node.value
        line = place.line + 1
        if not isinstance(key, str):
            problems.append(Problem(line, path, "a key must be a single word"))
        elif key in first_lines:
            problems.append(Problem(line, (*path, key), f"is there already, on line {first_lines[key]}; keep one"))
        else:
            first_lines[key] = line
            value = _located(loader, value_node, (*path, key), problems)
            yield key, replace(value, line=line, column=place.column, in_braces=bool(mapping.flow_style))
