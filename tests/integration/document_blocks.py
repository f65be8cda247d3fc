"""The code blocks of the documents, and the commands in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"\s+# .*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" for drawings), the file it is if it is titled, and where it stands."""

    language: str
    file: str | None
    text: str
    place: str

    def commands(self) -> list[str]:
        """What is typed: the lines after a prompt, and those they go on in, without comments."""
        text = re.sub(r"\\\n\s*", "", self.text)
        lines = [line for line in text.splitlines() if line.startswith("$ ")]
        return [_COMMENT.sub("", line.removeprefix("$ ")).strip() for line in lines]


def blocks_of(document: Path) -> list[Block]:
    """All of its blocks, in order."""
    text = document.read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0 and "\n    ```" not in text, (
        f"{document}: a fence is open or indented"
    )
    name = document.relative_to(ROOT).as_posix()
    return [
        Block(found[1], found[2], found[3], f"{name}:{text[: found.start()].count(chr(10)) + 1}")
        for found in _BLOCK.finditer(text)
    ]
