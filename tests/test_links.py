"""What the documents link to is there."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEMPLATES = {"specforge_core/hub/model_card.md", "specforge_core/hub/dataset_card.md"}
"""Their links are those of the repository that they are filled for."""
LINK = re.compile(r"""\]\(<?([^)\s>]+)[^)]*\)|<(?:img|a|source)\b[^>]*?(?:src|srcset|href)="([^"]+)\"""")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def dead_links(document: Path) -> list[str]:
    """Relative targets of its links and pictures that do not exist."""
    targets = [one or other for one, other in LINK.findall(CODE.sub("", document.read_text(encoding="utf-8")))]
    files = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    return [file for file in files if file and not (document.parent / file).exists()]


def test_every_relative_link_of_a_document_leads_somewhere() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    documents = {*listed.stdout.split()} - TEMPLATES
    assert {"README.md", "pools/README.md"} <= documents
    assert {name: dead for name in sorted(documents) if (dead := dead_links(ROOT / name))} == {}


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "[`self`](a.md#here) [web](https://example.org/x) [here](#there) ![gone](b.png) `[code](c.md)`\n"
        '```\n[code](d.md)\n```\n<img src="e.png"> [code `f`](f.md "title")\n'
    )
    assert dead_links(document) == ["b.png", "e.png", "f.md"]
