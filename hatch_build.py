"""README as a package index shows it: relative links and pictures lead nowhere there, so their text remains."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


def description(readme: str) -> str:
    """Return README without pictures, HTML comments and relative links (their text remains)."""
    text = re.sub(r"<!--.*?-->\n", "", readme)
    text = re.sub(r"!\[[^\]]*\]\((?!https?://)[^)]*\)\n+", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?://)[^)]*\)", r"\1", text)


class ReadmeHook(MetadataHookInterface):
    """Sets the package's description."""

    def update(self, metadata: dict) -> None:
        """Add `readme`, which pyproject.toml lists as dynamic."""
        text = (Path(self.root) / "README.md").read_text()
        metadata["readme"] = {"content-type": "text/markdown", "text": description(text)}
