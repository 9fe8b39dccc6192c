"""What the README and the docs say, runs: the Python blocks in order, the commands as far as their options."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<label>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```[ \t]*$", re.MULTILINE | re.DOTALL)
OURS = {"python", 'python title="gradmaker"', 'python title="torch.optim"'}
FOREIGN = re.compile(r'python title="(?!gradmaker"|torch\.optim")[^"]+"')
"""Lines of another library, beside ours: they are compiled, not run."""
SHELL = {"sh", "bash", "shell", "console", "zsh"}


class Block(NamedTuple):
    """A fenced block of a page."""

    label: str
    text: str
    line: int  # of its first line


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["label"].strip(), dedent(match["body"]), text.count("\n", 0, match.start("body")) + 1)
        for match in FENCE.finditer(text)
    ]


def commands(text: str) -> list[str]:
    """The command lines of a shell text: comments dropped, continued lines joined, one space between words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [" ".join(line.removeprefix("$ ").split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def shell(page: Path) -> list[str]:
    return [line for block in blocks(page) if block.label in SHELL for line in commands(block.text)]


def one_command(*words: str) -> str:
    """The README's only command line that makes an environment and contains these words."""
    found = [line for line in shell(ROOT / "README.md") if all(word in line for word in ("-m venv", *words))]
    assert len(found) == 1, f"README.md must have one command line with `-m venv` and {words}; it has {found}"
    return found[0]


@pytest.mark.usefixtures("registrations", "accelerate_anew")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for F.bilinear
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace a page, so that examples chain; the traceback shows the line of the page."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page):
        if FOREIGN.fullmatch(block.label):
            compile(block.text, str(page), "exec")
        elif "py" in block.label.lower():
            assert block.label in OURS, f"{page.name}:{block.line}: every block runs, so ```{block.label} is refused"
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), module.__dict__)


def test_readme_shows_the_loop() -> None:
    assert any(block.label == "python" and "forward_and_backward" in block.text for block in blocks(ROOT / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in shell(page):
        for command in re.split(r"&&|\|\||[;|]", line):
            check_command(shlex.split(command, comments=True), monkeypatch)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Known options for `gradmaker`, an existing file for a script, the constraints for `pip install`."""
    program, arguments = Path(words[0]).name, words[1:]
    if program == "gradmaker":
        assert help_of(arguments, monkeypatch) == 0, f"`{shlex.join(words)}` is not understood by the command line"
    elif program == "pip" and "install" in arguments:
        assert "-c constraints.txt" in " ".join(arguments), f"`{shlex.join(words)}` does not pin torch"
    elif program in {"python", "python3", "bash", "sh"} and not arguments[0].startswith("-"):
        assert (ROOT / arguments[0]).is_file(), f"`{shlex.join(words)}`: no such file"


def help_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of the command with `--help` appended: options are parsed, nothing runs."""
    from gradmaker.cli import main  # only where a page shows the command

    monkeypatch.setattr(sys, "argv", ["gradmaker", *arguments, "--help"])
    with pytest.raises(SystemExit) as stop:
        sys.exit(main())
    return int(stop.value.code or 0)


def test_readme_runs_the_comparison() -> None:
    line = one_command("gradmaker compare")
    assert "-c constraints.txt" in line and "[compare]" in line


def test_ci_runs_the_test_command_of_the_readme() -> None:
    line = one_command("pytest")
    assert all(word in line for word in ("-c constraints.txt", "[dev]", "ruff check", "ruff format --check", "mypy"))
    assert line in commands((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
