"""What MkDocs is told beside `mkdocs.yml`: files outside of `docs/`, links to them, and one tree of sources for the reference.

A link of a page to a file of the repository works on the web pages of a repository and in an editor. In the site it leads to a
page: of Markdown the page itself, of anything else its text.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
SOURCES = tempfile.TemporaryDirectory()
"""Of the reference; two builds may run at once."""
AXES = ("curvature", "representations", "solvers")
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(```.*?```)", re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cfg": "ini", ".json": "json"}


# ------------------------------------------------------------------ configuration
@event_priority(100)  # before the plugin that reads the sources
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Names the version, puts the sources where they install."""
    config.copyright = f"gradmaker {version()}, MIT licence"
    put_sources_together(Path(SOURCES.name))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [SOURCES.name]
    return config


def version() -> str:
    """That of `setup.cfg`."""
    declared = ConfigParser()
    declared.read(ROOT / "setup.cfg")
    return declared["metadata"]["version"]


def put_sources_together(folder: Path) -> None:
    """A copy as an installation has it: `gradmaker/` with the folders of the three axes inside."""
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gradmaker", folder / "gradmaker", ignore=leave_out)
    for axis in AXES:
        shutil.copytree(ROOT / axis, folder / "gradmaker" / axis, ignore=leave_out)


# ------------------------------------------------------------------ files of the repository
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for every file of the repository that a page links to, and for those that these link to."""
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        for target in list(outside(waiting.pop(), config)):
            if files.get_file_from_path(place(target)) is None:
                file = made(target, config)
                files.append(file)
                if file.is_documentation_page():
                    waiting.append(file)
    return files


def home(file: File) -> Path:
    """The file of the repository that a page is made of."""
    path = Path(file.src_uri)
    return ROOT / path.relative_to("repository") if path.parts[0] == "repository" else ROOT / "docs" / path


def outside(file: File, config: MkDocsConfig) -> Iterator[Path]:
    """What a page links to outside of `docs/`; other files than Markdown link to nothing."""
    if home(file).suffix == ".md":
        for match in LINK.finditer(FENCE.sub("", file.content_string)):
            target = resolved(home(file), match[2])
            if target is not None and place(target) != docs_place(target):
                yield target


def resolved(page: Path, link: str) -> Path | None:
    """The file that a link of a page means, if it is one."""
    target = Path(posixpath.normpath(page.parent / link))
    return target if "://" not in link and target.is_file() else None


def docs_place(target: Path) -> str | None:
    """Where a file of `docs/` lies in the site; None for others."""
    return target.relative_to(ROOT / "docs").as_posix() if target.is_relative_to(ROOT / "docs") else None


def place(target: Path) -> str:
    """Where a file of the repository lies in the site."""
    inside = docs_place(target)
    if inside is not None and target.suffix != ".py":
        return inside
    name = target.relative_to(ROOT).as_posix()
    return f"repository/{name}" if target.suffix in (".md", ".svg", ".png") else f"repository/{name}.md"


def made(target: Path, config: MkDocsConfig) -> File:
    """Markdown and pictures as they are, everything else as a page with its text."""
    if target.suffix in (".md", ".svg", ".png"):
        return File.generated(config, place(target), abs_src_path=str(target))
    language = LANGUAGES.get(target.suffix, "text")
    text = target.read_text(encoding="utf-8")
    name = target.relative_to(ROOT).as_posix()
    content = f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n````{language}\n{text}````\n"
    return File.generated(config, place(target), content=content)


# ------------------------------------------------------------------ links
def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository become links to their pages."""
    source = home(page.file)
    if source.suffix not in ("", ".md") and page.file.src_uri.startswith("repository/"):
        return markdown

    def rewritten(match: re.Match[str]) -> str:
        target = resolved(source, match[2])
        if target is None:
            return match[0]
        link = posixpath.relpath(place(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{link}{match[3] or ''}{match[4]}"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)
