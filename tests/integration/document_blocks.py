"""The code blocks of the documents, the commands in them and those within their sentences."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"\s+# .*$")
_WITHIN = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:pbkd|make|python -m)\s[^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" for drawings), the file it is if it is titled, and where it stands."""

    language: str
    file: str | None
    text: str
    place: str

    def commands(self) -> list[str]:
        """What is typed: the lines after a prompt, and those they go on in, without comments."""
        return [command for command, _ in self.transcript()]

    def transcript(self) -> list[tuple[str, list[str]]]:
        """Each of them with the lines it prints, as far as the block shows them."""
        found: list[tuple[str, list[str]]] = []
        for line in re.sub(r"\\\n\s*", "", self.text).splitlines():
            if line.startswith("$ "):
                found.append((_COMMENT.sub("", line.removeprefix("$ ")).strip(), []))
            elif found and line.strip():
                found[-1][1].append(line)
        return found


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


def commands_within(document: Path) -> list[str]:
    """The commands that its sentences and tables name in backticks, without settings of the environment."""
    text = _BLOCK.sub("", document.read_text(encoding="utf-8"))
    return [re.sub(r"^([A-Z_]+=\S+ )*", "", " ".join(found[1].split())) for found in _WITHIN.finditer(text)]
