"""What a comparison says it found, on numbers by hand."""

from __future__ import annotations

from dataclasses import replace

from gradmaker.compare.answer import Found, listed, rival, sentences
from gradmaker.compare.verdicts import Difference, Point, Reach, differences, front

REACHES = [
    Reach("adam", 0.98, 500.0, 1.0, 3, 3),
    Reach("sgd", 0.98, 800.0, 1.2, 3, 3),
    Reach("kfac", 0.98, 300.0, 1.4, 3, 3),
    Reach("muon", 0.98, 400.0, 0.9, 3, 3),
    Reach("slow", 0.98, None, None, 1, 3),
]


def pairs(mean: float, shown: bool) -> list[Difference]:
    return [Difference("kfac", other, 3, mean, 0.001, 0.0, 0.0, 9.0, 0.001, shown, "") for other in ("adam", "sgd")]


FOUND = Found(
    metric="accuracy",
    higher=True,
    ends={"adam": 0.981, "sgd": 0.98, "kfac": 0.985},
    plain=["sgd", "adam"],
    tests=pairs(0.004, True),
    reaches=REACHES,
    points=[Point("kfac", 0.985, 2.0, True), Point("adam", 0.981, 1.0, True), Point("sgd", 0.98, 1.5, False)],
    bad=["slow"],
)


def test_the_race_is_told_against_the_best_plain_optimizer() -> None:
    race, by_time, best, on_front, bad = sentences(FOUND)
    assert (
        race
        == "On this model kfac reaches 98.00 % of test accuracy in 0.6 of adam's steps (300 and 500) and 1.4 times its time."
    )
    assert by_time == "By time, muon is the first beside adam: 0.8 of adam's steps (400 and 500) and 0.9 of its time."
    assert best == "kfac ends with the best test accuracy, 98.50 %: better than adam and sgd by 3 seeds (paired t-tests)."
    assert on_front == "No row is better in both test accuracy and time than adam and kfac."
    assert bad == "Without a finished training: slow; their notes say why."


def test_what_is_not_shown_is_not_claimed() -> None:
    assert "kfac ends with the best test accuracy, 98.50 %: not told apart from adam and sgd by 3 seeds (paired t-tests)." in (
        sentences(replace(FOUND, tests=pairs(0.004, False)))
    )
    assert "no test says whether that is chance" in sentences(replace(FOUND, tests=[]))[2]
    mixed = [*pairs(0.004, True)[:1], *pairs(0.004, False)[1:]]
    assert "better than adam, not told apart from sgd" in sentences(replace(FOUND, tests=mixed))[2]


def test_a_lower_value_may_be_better() -> None:
    found = replace(FOUND, metric="loss", higher=False, ends={"adam": 0.12, "kfac": 0.1}, tests=[], reaches=[])
    assert sentences(found)[0].startswith("kfac ends with the best test loss, 0.1;")


def test_few_rows_or_none() -> None:
    assert sentences(replace(FOUND, ends={}))[0].startswith("No training came to an end")
    assert sentences(replace(FOUND, reaches=REACHES[:1]))[0].startswith("On this model only adam reaches 98.00 %")
    assert "reaches" not in " ".join(sentences(replace(FOUND, reaches=REACHES[4:])))
    timeless = [replace(reach, seconds=None) for reach in REACHES]
    assert sentences(replace(FOUND, reaches=timeless))[0].endswith("in 0.6 of adam's steps (300 and 500).")
    alone = sentences(replace(FOUND, ends={"kfac": 0.9}, tests=[], reaches=[], points=[], bad=[]))
    assert alone == ["kfac ends with the best test accuracy, 90.00 %."]


def test_without_a_plain_optimizer_the_second_is_the_measure() -> None:
    chosen = rival(REACHES, [])
    assert chosen is not None and chosen.label == "muon"
    assert rival([], ["sgd"]) is None


def test_long_lists_are_counted() -> None:
    assert [listed(list("abcdef")[:k]) for k in (1, 2, 3, 5)] == ["a", "a and b", "a, b and c", "a, b, c, d and e"]
    assert listed(list("abcdef")) == "a, b, c, d and 2 more"


def test_the_sentences_follow_from_the_data() -> None:
    """Tests and front of twelve seeds of two rows, one of them dearer and better by far more than its spread."""
    better = {seed: 0.95 + 0.001 * (seed % 3) for seed in range(12)}
    worse = {seed: 0.90 + 0.001 * (seed % 5) for seed in range(12)}
    points = front([("kfac", 0.951, 3.0), ("sgd", 0.902, 1.0), ("bad", 0.90, 4.0)], higher=True)
    found = replace(
        FOUND, ends={"sgd": 0.902, "kfac": 0.951}, tests=differences({"sgd": worse, "kfac": better}, True), points=points
    )
    told = sentences(found)
    assert told[2] == "kfac ends with the best test accuracy, 95.10 %: better than sgd by 12 seeds (paired t-tests)."
    assert told[3] == "No row is better in both test accuracy and time than sgd and kfac."


def test_ratios_above_one_are_no_counts() -> None:
    slow = sentences(replace(FOUND, reaches=[REACHES[0], Reach("kfac", 0.98, 1000.0, 0.5, 3, 3)]))[0]
    assert slow.endswith("in 2 times adam's steps (1000 and 500) and 0.5 of its time.")


def test_means_over_other_seeds_are_told() -> None:
    """The best mean is of the two seeds that finished; by the common ones the row is worse."""
    ends = {"kfac": {0: 0.5, 1: 0.52}, "sgd": {0: 0.6, 1: 0.6201, 2: 0.1}}
    worse = differences(ends, True)
    told = sentences(replace(FOUND, ends={"kfac": 0.51, "sgd": 0.44}, tests=worse, finished={"kfac": "2 of 3"}))
    assert (
        "kfac ends with the best test accuracy, 51.00 % over the 2 of 3 of its seeds that finished: worse than sgd by 2 "
        "seeds (paired t-tests)." in told
    )
    lower = replace(FOUND, metric="loss", higher=False, ends={"kfac": 0.51}, tests=differences(ends, False))
    assert "better than sgd by 2" in " ".join(sentences(lower))
