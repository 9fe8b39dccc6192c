"""One import name for four folders: installed, from a bare checkout, and beside a user's own `solvers.py`."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AXES = ("curvature", "representations", "solvers")
GENERATED = {
    ".git",
    ".venv",
    ".hypothesis",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "__pycache__",
    "build",
    "dist",
    "runs",
}


def config() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def files() -> Iterator[Path]:
    """The files of the project, whether git knows them yet or not."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in GENERATED and not name.endswith(".egg-info")]
        yield from (Path(folder, name) for name in names)


def sources() -> dict[str, Path]:
    """Path inside the installed package -> file of the checkout."""
    found = {path.relative_to(ROOT): path for path in (ROOT / "gradmaker").rglob("*.py")}
    found |= {"gradmaker" / path.relative_to(ROOT): path for axis in AXES for path in (ROOT / axis).rglob("*.py")}
    return {target.as_posix(): path for target, path in found.items()}


def python(code: str, cwd: Path, *, checkout_on_path: bool = True) -> str:
    """What a new interpreter prints; it fails when the interpreter does."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if checkout_on_path:
        environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_packages_are_the_folders() -> None:
    """Every folder with Python in it is listed, and nothing else is."""
    packages = config()["options"]["packages"].split()
    assert sorted(packages) == sorted({str(Path(name).parent).replace("/", ".") for name in sources()})
    folders = dict(re.findall(r"(\S+) = (\S+)", config()["options"]["package_dir"]))
    assert folders == {"gradmaker": "gradmaker"} | {f"gradmaker.{axis}": axis for axis in AXES}


def test_type_checker_sees_every_folder() -> None:
    assert re.split(r",\s*", config()["mypy"]["packages"]) == ["gradmaker", *(f"gradmaker.{axis}" for axis in AXES)]


def test_core_needs_torch_and_opt_einsum_only() -> None:
    assert config()["options"]["install_requires"].split() == ["torch>=2.6", "opt_einsum"]


def test_dependencies_are_pinned() -> None:
    """Every package that an extra names has a line in constraints.txt."""
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    requirements = config()["options"]["install_requires"] + "".join(config()["options.extras_require"].values())
    names = {re.split(r"[>=<\[]", line)[0].lower().replace("_", "-") for line in requirements.split("\n") if line}
    assert names - {"gradmaker"} <= pinned


@pytest.mark.parametrize("axis", AXES)
def test_hostile_neighbours_do_not_shadow(tmp_path: Path, axis: str) -> None:
    """A script beside its own `solvers.py`, `representations.py` and `curvature/` imports ours."""
    for name in ("solvers.py", "representations.py", "curvature/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('the file of the user was imported')\n")
    code = f"import gradmaker, gradmaker.{axis} as axis; print(axis.__name__, axis.__file__)"
    assert python(code, tmp_path) == f"gradmaker.{axis} {ROOT / axis / '__init__.py'}"


def test_bare_checkout_runs_from_its_root() -> None:
    code = "import gradmaker, gradmaker.solvers as solvers; print(gradmaker.__file__, solvers.__file__)"
    expected = f"{ROOT / 'gradmaker' / '__init__.py'} {ROOT / 'solvers' / '__init__.py'}"
    assert python(code, ROOT, checkout_on_path=False) == expected


def test_extras_are_not_imported(tmp_path: Path) -> None:
    """Every module but the comparison and the command imports where the packages of the extras are missing."""
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources()]
    core = [name for name in modules if not name.startswith(("gradmaker.compare", "gradmaker.cli"))]
    blocked = ["datasets", "jinja2", "matplotlib", "pandas", "PIL", "rich", "sklearn", "typer", "yaml"]
    code = f"""
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
for name in {core}:
    importlib.import_module(name)
print(sorted(set(sys.modules) & set({blocked})))
"""
    assert python(code, tmp_path) == "[]"


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def test_imports_are_absolute() -> None:
    """`import solvers` in the checkout would make a second copy of every class."""
    banned = {
        (path.name, name)
        for path in files()
        if path.suffix == ".py"
        for name in imported(path)
        if name.startswith(".") or name.partition(".")[0] in AXES
    }
    assert not banned


def test_no_paths_of_one_machine() -> None:
    machine = re.compile(r"(?<![\w.])/(work|root|home)/")
    suffixes = {".cfg", ".toml", ".txt", ".in", ".md", ".yaml", ".yml", ".py", ".j2", ".json", ".csv", ".html", ""}
    texts = [path for path in files() if path.suffix in suffixes and path != Path(__file__)]
    assert [path for path in texts if machine.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", ["setup.cfg", "pyproject.toml", "constraints.txt", ".ci/run", ".pre-commit-config.yaml"])
def test_no_package_index_is_named(name: str) -> None:
    """Where packages come from is the business of the machine's own pip configuration."""
    assert not re.search(r"index-url|find-links|file://|pypi\.org|pythonhosted|whl/", (ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The names inside the sdist and inside the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("build")
    source, output = folder / "source", folder / "dist"
    for path in files():  # a copy: building leaves build/ and *.egg-info behind
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stdout + process.stderr
    with zipfile.ZipFile(next(output.glob("*.whl"))) as wheel, tarfile.open(next(output.glob("*.tar.gz"))) as sdist:
        return {"wheel": set(wheel.namelist()), "sdist": {name.partition("/")[2] for name in sdist.getnames()}}


def templates() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "gradmaker" / "compare").glob("*.j2")}


def test_wheel_contents(archives: dict[str, set[str]]) -> None:
    """The four folders under one name, the marker, the templates, the license: no test, no top-level `solvers`."""
    information = {name for name in archives["wheel"] if ".dist-info/" in name}
    assert any(name.endswith("licenses/LICENSE") for name in information)
    assert templates()
    assert archives["wheel"] - information == {*sources(), *templates(), "gradmaker/py.typed"}


def test_sdist_contents(archives: dict[str, set[str]]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in sources().values()}
    expected = {
        *modules,
        *templates(),
        "gradmaker/py.typed",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "constraints.txt",
        "setup.cfg",
    }
    assert expected <= archives["sdist"]
    assert not [name for name in archives["sdist"] if name.startswith("tests")]
