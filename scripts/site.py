"""Hooks of mkdocs.yml: README.md as the first page, and links that leave docs/."""

import re
from pathlib import Path

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).resolve().parent.parent
INDEX = "index.md"
_LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)\s]+)\)")


def on_config(config):
    """Drop pages from the navigation that this checkout does not have."""
    config.nav = [
        entry
        for entry in config.nav
        if all(page == INDEX or (REPOSITORY / "docs" / page).is_file() for page in entry.values())
    ]
    return config


def on_files(files, config):
    """Add the first page, and the images that pages show from outside of docs/."""
    readme = REPOSITORY / "README.md"
    files.append(File.generated(config, INDEX, content=site_links(readme.read_text(encoding="utf-8"), readme.parent)))
    for page in (REPOSITORY / "docs").glob("*.md"):
        for image, _, target in _LINK.findall(page.read_text(encoding="utf-8")):
            source = (page.parent / target).resolve()
            if image and target.startswith("../") and files.get_file_from_path(_outside(source)) is None:
                files.append(File.generated(config, _outside(source), abs_src_path=str(source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to where the site has their targets."""
    return markdown if page.file.src_uri == INDEX else site_links(markdown, REPOSITORY / "docs")


def site_links(markdown: str, folder: Path) -> str:
    """Links of a page in `folder`, relative to docs/: pages and images of the site are linked, any other file of the
    repository becomes its path."""

    def replaced(match: re.Match) -> str:
        image, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        found = (folder / path).resolve()
        docs = REPOSITORY / "docs"
        if found.is_relative_to(docs):
            return f"{image}[{text}]({found.relative_to(docs).as_posix()}{hash_}{anchor})"
        if image:
            return f"![{text}]({_outside(found)})"
        name = found.relative_to(REPOSITORY).as_posix()
        return text if text.strip("`") == name else f"{text} (`{name}`)"

    return _LINK.sub(replaced, markdown)


def _outside(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()
