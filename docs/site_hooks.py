"""Links from a page to files of the repository that are no pages: the site shows their paths."""

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, files: Any, **_: Any) -> str:
    """Replaces `[text](../configs/x.py)` by the text and the path, outside the site's folder."""
    folder = posixpath.dirname(page.file.src_uri)

    def replace(link: re.Match[str]) -> str:
        text, target, _ = link.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return link.group()  # a page or a picture, or a mistake that mkdocs names
        return text if text.strip("`").endswith(path) else f"{text} (`{path}`)"

    return LINK.sub(replace, markdown)
