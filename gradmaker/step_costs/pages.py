"""The files of a study: JSON, CSV, Markdown and figures."""

from pathlib import Path

from gradmaker.step_costs.figures import write_figures
from gradmaker.step_costs.study import JSON, Costs
from gradmaker.step_costs.tables import markdown, write_csv

__all__ = ["write"]


def write(costs: Costs, out: Path) -> dict[str, Path]:
    """Write all files of a study; returns their paths by kind."""
    out.mkdir(parents=True, exist_ok=True)
    costs.write(out)
    write_csv(costs, out / "cost.csv")
    figures = write_figures(costs, out)
    (out / "cost.md").write_text(markdown(costs, figures), encoding="utf-8")
    named = {Path(name).stem: out / name for name in figures}
    return {"json": out / JSON, "csv": out / "cost.csv", "markdown": out / "cost.md", **named}
