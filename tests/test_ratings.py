"""mini_qwen/ratings.py: the scores of votes whose answer is known."""

import numpy as np
import pytest
from test_votes import vote

pytest.importorskip("choix", reason="choix is not installed")

from mini_qwen.ratings import FEWEST_VOTES, Rating, rate, score
from mini_qwen.votes import Answer, Vote


def scores(votes: list[Vote]) -> dict[str, float]:
    return {rating.model: rating.score for rating in rate(votes)}


def points(ratio: float) -> float:
    return 400 * np.log10(ratio)


def test_two_models_have_the_odds_of_their_wins() -> None:
    """3 and 1 wins, half a win each way beside them: 3.5 : 1.5."""
    found = scores([vote(winner="a")] * 3 + [vote(winner="b")])
    assert found["a"] - found["b"] == pytest.approx(points(3.5 / 1.5), abs=1e-4)
    assert found["a"] + found["b"] == pytest.approx(2000)


def test_true_strengths_are_found() -> None:
    """Wins in the shares that the model says, so many that the prior does not count."""
    strengths = np.array([8.0, 4.0, 1.0, 2.0])
    wins = 1e6 * strengths[:, None] / (strengths[:, None] + strengths)
    found = score(wins)
    assert found - found[2] == pytest.approx(points(strengths), abs=0.01)
    assert found.mean() == pytest.approx(1000)


def test_a_tie_is_half_a_win_each_way() -> None:
    ties = scores([vote("tie", None)] * 7 + [vote("all_bad", None)] * 2)
    assert ties["a"] == pytest.approx(ties["b"])
    one_each = [vote(winner="a"), vote(winner="b")]
    assert scores(one_each + [vote(winner="a")]) == pytest.approx(scores([vote("tie", None)] * 2 + [vote(winner="a")]))


def test_a_winner_of_four_beats_three() -> None:
    four = vote(winner="b", a="1", b="2", c="3", d="4")
    found = scores([four])
    assert found["b"] > found["a"] == pytest.approx(found["c"]) == pytest.approx(found["d"])
    pairs = [vote(winner="b", **{name: "1", "b": "2"}) for name in "acd"]
    assert found == pytest.approx(scores(pairs))


def test_a_failed_model_takes_no_part() -> None:
    failed = Answer("c", "", None, False, "it crashed")
    with_failure = [vote(winner="a", a="1", b="2", c=failed)] * 4
    assert scores(with_failure) == pytest.approx(scores([vote(winner="a", a="1", b="2")] * 4))
    assert rate([vote(winner="a", a="1", c=failed)]) == []  # nothing was compared


def test_no_votes_no_scores() -> None:
    assert rate([]) == []


def test_votes_and_wins_are_counted() -> None:
    votes = [vote(winner="a", a="1", b="2"), vote("tie", None, a="1", c="3"), vote(winner="c", b="2", c="3")]
    counts = {rating.model: (rating.num_votes, rating.num_wins) for rating in rate(votes)}
    assert counts == {"a": (2, 1), "b": (2, 0), "c": (2, 1)}


def test_the_strongest_is_first_and_a_model_that_won_all_is_finite() -> None:
    ratings = rate([vote(winner="b")] * 500)
    assert [rating.model for rating in ratings] == ["b", "a"]
    assert ratings[0].score - ratings[1].score == pytest.approx(points(500.5 / 0.5), abs=1e-3)


def drawn(number: int, seed: int) -> list[Vote]:
    """Votes between two models of 3 : 1."""
    generator = np.random.default_rng(seed)
    return [vote(winner="a" if generator.random() < 0.75 else "b") for _ in range(number)]


def width(rating: Rating) -> float:
    assert rating.interval is not None
    return rating.interval[1] - rating.interval[0]


def test_the_interval_holds_the_truth_nearly_always_and_narrows() -> None:
    truth = 1000 + points(3) / 2
    ratings = [next(r for r in rate(drawn(60, seed)) if r.model == "a") for seed in range(40)]
    inside = [rating.interval[0] <= truth <= rating.interval[1] for rating in ratings if rating.interval]
    assert len(inside) == 40 and 34 <= sum(inside) <= 40
    assert width(rate(drawn(960, 0))[0]) < width(rate(drawn(60, 0))[0]) / 2


def test_few_votes_have_no_interval_and_the_same_votes_the_same_one() -> None:
    assert all(rating.interval is None for rating in rate(drawn(FEWEST_VOTES - 1, 0)))
    votes = drawn(FEWEST_VOTES, 0)
    assert rate(votes) == rate(votes)
    assert all(rating.interval is not None for rating in rate(votes))
