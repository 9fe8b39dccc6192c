"""Reports: a typed document becomes one HTML file that needs no network, and its figures SVG and PDF files.

A page is written by an author who knows what was measured; this folder knows how it is shown. The author makes a `Document`:
an answer first, then sections of tables, figures, text. A row, as a method, has one colour on the whole page. Tables sort and
filter, figures show values under the pointer, and their legends switch rows on and off in all figures at once. The page is
light or dark, and made for a phone and for paper, too. Figures are drawn by Vega-Lite, tables by DataTables; both lie packed
in the file and take 0.65 MB of it. It needs the extra ``compare``.

>>> from gradmaker.reporting import Axis, Column, Document, Figure, Rule, Section, Series, Table, write
>>> columns = [Column("method", kind="row"), Column("accuracy", kind="percent", best="high"), Column("step", kind="seconds")]
>>> rows = [{"method": "Adam", "accuracy": 0.971, "step": 2.1e-3}, {"method": "K-FAC", "accuracy": 0.982, "step": 3.4e-3}]
>>> loss = [Series("Adam", [1, 10, 100], [2.3, 0.9, 0.2]), Series("K-FAC", [1, 10, 100], [2.3, 0.5, 0.1])]
>>> curves = Figure("loss", "Training loss", Axis("step", "log"), Axis("loss", "log"), loss, rules=[Rule(0.2, "target")])
>>> document = Document(
...     title="Two methods on digits",
...     answer=["K-FAC reaches a loss of 0.2 in fewer steps than Adam."],
...     sections=[Section("Summary", [Table("summary", "", columns, rows)]), Section("Curves", [curves])],
...     notes=["One seed."],
...     machine={"processor": "any", "torch": "2.13"},
...     command="gradmaker compare adam kfac",
... )
>>> paths = write(document, "runs/example")
>>> sorted(paths)
['html', 'json', 'loss.pdf', 'loss.svg', 'markdown']
>>> Document.from_json(paths["json"].read_text()).answer
('K-FAC reaches a loss of 0.2 in fewer steps than Adam.',)

Numbers go in as numbers: `Column` writes shares as percent, seconds and bytes with the unit that fits, and a deviation behind
±. What is missing is None. A `Series` with ``mark="points"`` and ``low`` and ``high`` has error bars, with ``mark="bars"`` over
a y axis of ``scale="category"`` lying bars that are stacked; `HeatMap` has a number for each pair of names, as the error of
each method on each layer. Thin a curve to some 200 points before it goes in: the page holds all of them.
"""

from gradmaker.reporting.document import Block, Code, Document, Facts, Section, Text
from gradmaker.reporting.figure import Axis, Figure, HeatMap, Rule, Series
from gradmaker.reporting.files import write, write_figures, write_picture
from gradmaker.reporting.markdown import markdown
from gradmaker.reporting.page import html
from gradmaker.reporting.table import Best, Column, Table

__all__ = [
    "Axis",
    "Best",
    "Block",
    "Code",
    "Column",
    "Document",
    "Facts",
    "Figure",
    "HeatMap",
    "Rule",
    "Section",
    "Series",
    "Table",
    "Text",
    "html",
    "markdown",
    "write",
    "write_figures",
    "write_picture",
]
