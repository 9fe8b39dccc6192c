"""results.json: all finished trials, written after each one and read when a run resumes."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradmaker.compare.errors import InputError
from gradmaker.compare.trial import Record

FORMAT = 2
RESULTS = "results.json"


class Store:
    """Trials and costs of an output folder, by key; those of other settings are kept but not reported."""

    def __init__(self, out: Path) -> None:
        self.path = out / RESULTS
        self._make_folder(out)
        content = self._read()
        self.records = {key: Record(**record) for key, record in content.get("trials", {}).items()}
        self.costs: dict[str, dict[str, Any]] = content.get("costs", {})
        self.report: dict[str, Any] = content.get("report", {})
        self.comparison: dict[str, Any] = content.get("comparison", {})

    def write(self) -> None:
        """Replace the file atomically: an interrupted write keeps the old one."""
        content = {
            "format": FORMAT,
            "report": self.report,
            "comparison": self.comparison,
            "costs": self.costs,
            "trials": {key: asdict(record) for key, record in self.records.items()},
        }
        fresh = self.path.with_suffix(".json.new")
        fresh.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
        os.replace(fresh, self.path)

    @staticmethod
    def _make_folder(out: Path) -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            probe = out / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"cannot write to the output folder {str(out)!r}: {error.strerror}") from error

    def _read(self) -> dict[str, Any]:
        return read_results(self.path) if self.path.exists() else {}


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results.json. InputError for a file that cannot be read or is none of this version."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") == FORMAT:
            return content
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (ValueError, AttributeError):
        pass
    raise InputError(f"{str(path)!r} is not a results file of this version: move it away or choose another --out")
