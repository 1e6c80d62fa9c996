"""Ratings: how strong each model of the arena is, by Bradley and Terry's model of paired comparisons."""

from typing import NamedTuple

import choix
import numpy as np

from mini_qwen.votes import Vote

PRIOR_WINS = 0.5  # imaginary wins of each model against each other one: without them a model that won all is infinite
POINTS = 400 / np.log(10)  # 400 points more are 10 : 1, as chess counts
MEAN = 1000.0
SAMPLES = 200
FEWEST_VOTES = 10  # resampling two votes that agree would claim to know for sure


class Rating(NamedTuple):
    model: str
    score: float
    interval: tuple[float, float] | None  # 95%, by resampling the votes; None where there are too few
    num_votes: int
    num_wins: int


def rate(votes: list[Vote], seed: int = 0) -> list[Rating]:
    """The models that took part in a vote, the strongest first.

    A winner beats each of the others; in a tie, and where all are bad, everyone has half a win against everyone. A
    model that failed took no part. Two models with 3 and 1 wins: (3 + 0.5) : (1 + 0.5), which are 147 points.
    """
    matrices, names = win_matrices(votes)
    if not names:
        return []
    scores = score(matrices.sum(axis=0))
    generator = np.random.default_rng(seed)
    drawn = [generator.integers(len(matrices), size=len(matrices)) for _ in range(SAMPLES)]
    samples = np.stack([score(matrices[chosen].sum(axis=0)) for chosen in drawn])
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    ratings = []
    for at, name in enumerate(names):
        own = [vote for vote in votes if name in participants(vote)]
        interval = (float(low[at]), float(high[at])) if len(own) >= FEWEST_VOTES else None
        num_wins = sum(vote.winner == name for vote in own)
        ratings.append(Rating(name, float(scores[at]), interval, len(own), num_wins))
    return sorted(ratings, key=lambda rating: (-rating.score, rating.model))


def participants(vote: Vote) -> list[str]:
    names = [answer.model for answer in vote.answers if answer.error is None]
    return names if len(names) > 1 else []


def win_matrices(votes: list[Vote]) -> tuple[np.ndarray, list[str]]:
    """Wins of row against column, [votes, models, models], and the models."""
    names = sorted({name for vote in votes for name in participants(vote)})
    matrices = np.zeros((len(votes), len(names), len(names)))
    for matrix, vote in zip(matrices, votes, strict=True):
        present = [names.index(name) for name in participants(vote)]
        if vote.winner is None:
            matrix[np.ix_(present, present)] = 0.5
            np.fill_diagonal(matrix, 0)
        elif present:
            winner = names.index(vote.winner)
            matrix[winner, [other for other in present if other != winner]] = 1
    return matrices, names


def score(wins: np.ndarray) -> np.ndarray:
    """Points of each model, [models], their mean 1000, out of the wins of row against column."""
    if len(wins) == 1:
        return np.array([MEAN])
    prior = PRIOR_WINS * (1 - np.eye(len(wins)))
    return MEAN + POINTS * choix.ilsr_pairwise_dense(wins + prior, max_iter=10_000)
