"""Checks of options: what is legal at each edge, and one dialect of errors."""

from __future__ import annotations

import math
import re

import pytest

from gradmaker.options.checks import check_choice, check_count, check_interval, check_kind
from gradmaker.options.suggestions import did_you_mean
from gradmaker.options.yaml_text import parse_yaml
from gradmaker.representations import REPRESENTATIONS
from gradmaker.solvers import SOLVERS


def test_edges_of_an_interval() -> None:
    check_interval("x", 0.5, 0, 1)
    check_interval("x", 0, 0, 1, closed=True)
    check_interval("x", -5, -math.inf, 0)
    for value in (0, 1, -0.1, math.nan, math.inf, True, "0.5", None):
        with pytest.raises(ValueError, match=re.escape(f"x={value!r}: expected 0 < x < 1, or None")):
            check_interval("x", value, 0, 1, hint=", or None")
    for value in (1, -0.1, math.nan, False):
        with pytest.raises(ValueError, match=r"expected 0 <= x < 1$"):
            check_interval("x", value, 0, 1, closed=True)
    for value in (math.inf, -math.inf):
        with pytest.raises(ValueError, match="expected -inf < x < inf"):
            check_interval("x", value, -math.inf, math.inf)


def test_edges_of_a_count() -> None:
    check_count("x", 2, 2)
    for value in (1, 2.0, True, None, "2"):
        with pytest.raises(ValueError, match=re.escape(f"x={value!r}: expected an integer of at least 2, or None")):
            check_count("x", value, 2, hint=", or None")


def test_choices_and_kinds() -> None:
    check_choice("x", "one", ("one", "two"))
    with pytest.raises(ValueError, match=r"^x='tow': expected one, two, or None; did you mean 'two'\?$"):
        check_choice("x", "tow", ("one", "two"), hint=", or None")
    with pytest.raises(ValueError, match=r"^x=\[1\]: expected one, two$"):
        check_choice("x", [1], ("one", "two"))
    check_kind("x", True, bool)
    with pytest.raises(ValueError, match=r"^x=1: expected bool$"):
        check_kind("x", 1, bool)


def test_close_names_in_any_case() -> None:
    assert did_you_mean("fishermc", {"FisherMC": 0, "GGN": 1}) == "expected FisherMC, GGN; did you mean 'FisherMC'?"
    assert did_you_mean("zzz", ["FisherMC"]) == "expected FisherMC"


def test_numbers_in_yaml() -> None:
    found = parse_yaml("{a: 1e-3, b: 1.0e-3, c: -2.E+4, d: .5e1, e: '1e-3', f: 1e, g: e3, h: [1E6], i: 3, j: 1.5}")
    assert found == {"a": 1e-3, "b": 1e-3, "c": -2e4, "d": 5.0, "e": "1e-3", "f": "1e", "g": "e3", "h": [1e6], "i": 3, "j": 1.5}


@pytest.mark.parametrize("make", [*REPRESENTATIONS.values(), *SOLVERS.values()], ids=lambda make: make.__name__)
def test_parts_refuse_in_one_dialect(make: type) -> None:
    """Every option that is a word."""
    words = [name for name, value in vars(make()).items() if isinstance(value, str)]
    for name in words:
        with pytest.raises(ValueError, match=rf"^{name}='no such word'.*: .*expected"):
            make(**{name: "no such word"})
