"""What a breakage is, and how its line is found: by quotation, so that a line that moved or changed is noticed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class LineGone(Exception):
    """The quoted line is not in its file, or stands there more than once."""


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One line of the package, what it becomes, and the tests that must fail then."""

    name: str
    """Short and unique: ``clip-upper-sign``."""
    file: str
    """Path from the root of the repository."""
    line: str
    """The whole line as it stands in the file, without indentation."""
    becomes: str
    """What replaces it, with the same indentation; ``pass`` drops a statement."""
    tests: tuple[str, ...]
    """Arguments of pytest: files or node ids; as few and as quick as show the fault."""
    after: str = ""
    """A line (without indentation) that stands somewhere above, where the quoted line alone is not unique."""

    def apply(self, root: Path) -> str:
        """Return the text of the file below `root` with the line replaced.

        Raises:
            LineGone: the line has to be quoted anew; the message says how often it was found.
        """
        lines = (root / self.file).read_text().splitlines(keepends=True)
        stripped = [line.strip() for line in lines]
        start = 0
        if self.after:
            if self.after not in stripped:
                raise LineGone(f"{self.name}: {self.file} has no line {self.after!r}")
            start = stripped.index(self.after) + 1
        places = [number for number in range(start, len(lines)) if stripped[number] == self.line]
        if not places or (len(places) > 1 and not self.after):
            raise LineGone(
                f"{self.name}: {self.file} has {len(places)} lines {self.line!r}; quote the line that has the same "
                "effect now, and say in `after` which of several it is"
            )
        number = places[0]
        indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
        lines[number] = f"{indent}{self.becomes}\n"
        return "".join(lines)
