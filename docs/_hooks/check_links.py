"""Checks every relative link of the Markdown files, offline: the file, and the heading behind a ``#``.

``python docs/_hooks/check_links.py`` prints what is broken and exits with 1; nothing is fetched.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^)\s]+)(?:\s+\"[^\"]*\")?\)")
FENCE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1[ \t]*$", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown's toc extension makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", lambda match: match[1] or "", heading)
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}_{again}" if again else slug for slug, last in found.items() for again in range(last + 1)}


def broken(page: Path) -> list[str]:
    """One sentence for each link of a page that leads nowhere."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    found = []
    for match in LINK.finditer(prose):
        path, _, anchor = match["target"].partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            found.append(f"{page.relative_to(ROOT)}: {match['target']} is not there.")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
            found.append(f"{page.relative_to(ROOT)}: {target.relative_to(ROOT)} has no heading #{anchor}.")
    return found


def pages() -> list[Path]:
    """Every Markdown file that readers see."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


if __name__ == "__main__":
    found = [line for page in pages() for line in broken(page)]
    print("\n".join(found) or f"{len(pages())} pages, no broken link")
    sys.exit(bool(found))
