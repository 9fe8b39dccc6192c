"""A report as data: title, answer, sections of tables and figures, notes, machine, and what runs it again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from gradmaker.reporting.figure import Axis, Figure, HeatMap, Rule, Series
from gradmaker.reporting.table import Column, Table

FORMAT = 1


@dataclass(frozen=True)
class Text:
    """Paragraphs, or the items of a list."""

    paragraphs: Sequence[str]
    bullets: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values, as settings."""

    values: Mapping[str, str]
    title: str = ""


@dataclass(frozen=True)
class Code:
    """A command, a configuration or a model as text.

    Args:
        title: what it is; with `collapsed`, shown after a click on it.
    """

    text: str
    title: str = ""
    collapsed: bool = False


Block = Table | Figure | HeatMap | Text | Facts | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; neighbouring figures stand side by side where the page is wide."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A report: what was found, then sections, then how it was measured; `to_json` and `from_json` keep it.

    Args:
        answer: sentences that say what was found, first on the page.
        lead: a line below the title, as the sizes of the run.
        warning: what makes the report incomplete; empty: nothing.
        rows: names of rows in the order of their colours; further ones follow as they appear.
        notes: how the numbers were measured.
        machine: processor, threads, versions, date.
        command: the command line that writes the report again.
        files: other things that it needs, as configurations, by title.
    """

    title: str
    answer: Sequence[str]
    sections: Sequence[Section]
    lead: str = ""
    warning: str = ""
    rows: Sequence[str] = ()
    notes: Sequence[str] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.answer:
            raise ValueError(f"report {self.title!r}: no answer: say in a sentence what was found, or why nothing was")
        names = [block.name for block in self.blocks if isinstance(block, Table | Figure | HeatMap)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"report {self.title!r}: {', '.join(twice)}: more than one table or figure of that name")

    @property
    def blocks(self) -> Iterator[Block]:
        """All blocks of all sections."""
        return (block for section in self.sections for block in section.blocks)

    @property
    def figures(self) -> list[Figure | HeatMap]:
        """All figures."""
        return [block for block in self.blocks if isinstance(block, Figure | HeatMap)]

    def slots(self) -> dict[str, int]:
        """The colour of every row, as a number: as in `rows`, then as they appear in the figures."""
        found = [*self.rows, *(row for figure in self.figures for row in figure.rows)]
        return {row: slot for slot, row in enumerate(dict.fromkeys(found))}

    def to_json(self) -> str:
        """The document as JSON text, from which it can be written again without a measurement."""
        return json.dumps({"format": FORMAT, **_plain(self)}, ensure_ascii=False, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Document":
        """The document of a JSON text. ValueError for another format, or what is no document."""
        content = json.loads(text)
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != FORMAT:
            raise ValueError(f"format={found!r}: this version reads format {FORMAT}, which Document.to_json writes")
        document = _made(content)
        if not isinstance(document, cls):
            raise ValueError(f"expected a Document, found {type(document).__name__}")
        return document


CLASSES = (Document, Section, Text, Facts, Code, Table, Column, Figure, HeatMap, Axis, Series, Rule)
PARTS = {cls.__name__: cls for cls in CLASSES}
TYPE = "$type"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        kept = {field.name: getattr(value, field.name) for field in fields(value)}
        return {TYPE: type(value).__name__, **{name: _plain(item) for name, item in kept.items()}}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _made(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_made, value))
    if not isinstance(value, dict):
        return value
    items = {key: _made(item) for key, item in value.items() if key != TYPE}
    if TYPE not in value:
        return items
    if value[TYPE] not in PARTS:
        raise ValueError(f"{value[TYPE]!r}: no part of a document; legal are {', '.join(PARTS)}")
    return PARTS[value[TYPE]](**items)
