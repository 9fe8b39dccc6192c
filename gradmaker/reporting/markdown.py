"""A document as Markdown, for places that show no HTML: text and tables, figures as links to their SVG files."""

from collections.abc import Iterable

from gradmaker.reporting.document import Block, Code, Document, Facts, Section, Text
from gradmaker.reporting.figure import Figure, HeatMap
from gradmaker.reporting.table import Table


def markdown(document: Document, figures: str = "figures") -> str:
    """The text; `figures` is the folder of the SVG files."""
    answer = [f"**{document.answer[0]}**", *document.answer[1:]]
    ends = [
        Section("How it was measured", [Text(document.notes, bullets=True)] if document.notes else []),
        Section("Machine and versions", [Facts(document.machine)] if document.machine else []),
        Section("Run it again", [Code(document.command)] if document.command else []),
    ]
    parts = [f"# {document.title}", document.lead, f"**{document.warning}**" if document.warning else "", *answer]
    for section in (*document.sections, *(section for section in ends if section.blocks)):
        parts += [f"## {section.title}", *(text for block in section.blocks for text in _block(block, figures))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block, figures: str) -> Iterable[str]:
    if isinstance(block, Text):
        yield from ["\n".join(f"- {item}" for item in block.paragraphs)] if block.bullets else block.paragraphs
    elif isinstance(block, Facts):
        yield "\n".join(f"- {name}: {value}" for name, value in block.values.items())
    elif isinstance(block, Code):
        yield f"```\n{block.text}\n```"
    elif isinstance(block, Figure | HeatMap):
        yield f"![{block.title}]({figures}/{block.name}.svg)"
        yield block.caption
    elif not block.collapsed:
        yield _table(block)
        yield block.caption


def _table(table: Table) -> str:
    columns = table.columns
    lines = [
        [column.title or column.key for column in columns],
        ["---:" if column.numeric else "---" for column in columns],
        *([column.text(row) for column in columns] for row in table.rows),
    ]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
