"""Same or different? Verification of identities that were never seen in training.

It takes any arrays labelled by identity: photographs, letters, spectrograms. Shapes: N
examples, P pairs, K thresholds.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from metalstm.base import Learner, LearnerState
from metalstm.checks import check_at_least, check_choice, check_share
from metalstm.data.episodes import prepare_examples

__all__ = [
    "Pairs",
    "Summary",
    "Verification",
    "bootstrap_over_identities",
    "draw_pairs",
    "pool_examples",
    "receiver_operating_characteristic",
    "score_pairs",
    "verify",
]

Similarity = Literal["cosine", "euclidean"]


class Pairs(NamedTuple):
    first: np.ndarray  # [P] int, rows of the examples
    second: np.ndarray  # [P] int
    same: np.ndarray  # [P] bool, whether both have one identity


class Verification(NamedTuple):
    """The curve of a threshold's two errors; pairs that score at least it are "same".

    Rates are shares: a false accept is a pair of two identities taken for one.
    """

    thresholds: np.ndarray  # [K], from infinity down
    false_accepts: np.ndarray  # [K], rising from 0 to 1
    true_accepts: np.ndarray  # [K], rising from 0 to 1
    num_same: int
    num_different: int

    @property
    def equal_error_rate(self) -> float:
        """Return where false accepts are as frequent as false rejects, interpolated.

        >>> scores, same = [0.9, 0.8, 0.3, 0.1], [True, False, True, False]
        >>> receiver_operating_characteristic(scores, same).equal_error_rate
        0.5
        """
        gap = self.false_accepts - (1 - self.true_accepts)  # rises from -1 to 1
        after = int(np.argmax(gap >= 0))
        before = after - 1
        share = -gap[before] / (gap[after] - gap[before])
        rise = self.false_accepts[after] - self.false_accepts[before]
        return float(self.false_accepts[before] + share * rise)

    @property
    def area(self) -> float:
        """Return the area under the curve: 1 is perfect, 0.5 is chance.

        >>> scores, same = [0.9, 0.8, 0.3, 0.1], [True, False, True, False]
        >>> receiver_operating_characteristic(scores, same).area
        0.75
        """
        return float(np.trapezoid(self.true_accepts, self.false_accepts))

    def true_accepts_at(self, false_accept_rate: float = 0.01) -> float:
        """Return the most true accepts at no more than this share of false accepts.

        Raises:
          ValueError: a rate outside (0, 1], or too few pairs to measure it.
        """
        check_share("false_accept_rate", false_accept_rate)
        if false_accept_rate * self.num_different < 1:
            raise ValueError(
                f"false_accept_rate={false_accept_rate} is less than one of the "
                f"{self.num_different} pairs of two identities: give at least "
                f"{int(np.ceil(1 / false_accept_rate))} of them"
            )
        allowed = self.false_accepts <= false_accept_rate
        return float(self.true_accepts[allowed].max())

    def summary(self, false_accept_rate: float = 0.01) -> Summary:
        """Return the three numbers; raises ValueError as `true_accepts_at` does."""
        accepted = self.true_accepts_at(false_accept_rate)
        return Summary(self.equal_error_rate, accepted, self.area)


class Summary(NamedTuple):
    """Shares; each a number, or with an interval's ends (low, high)."""

    equal_error_rate: Any
    true_accepts: Any  # at ``false_accept_rate`` false accepts
    area: Any


def receiver_operating_characteristic(
    scores: np.ndarray, same: np.ndarray, *, weights: np.ndarray | None = None
) -> Verification:
    """Return the curve of scores [P], higher is more similar, against the truth [P].

    Pairs of equal score are accepted together, so that ties help no method.

    Args:
      weights: [P], how many pairs each counts as; None: one.

    Raises:
      ValueError: scores that are not numbers, or pairs of one kind alone.
    """
    scores, same = np.asarray(scores, np.float64), np.asarray(same, bool)
    if scores.ndim != 1 or scores.shape != same.shape:
        raise ValueError(
            f"scores has the shape {scores.shape} and same {same.shape}: give one of "
            "each for every pair"
        )
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of the scores are not numbers")
    num_same = int(same.sum())
    num_different = len(same) - num_same
    if not num_same or not num_different:
        raise ValueError(
            f"{num_same} pairs of one identity and {num_different} of two: the curve "
            "needs both"
        )
    order = np.argsort(-scores, kind="stable")
    ranked, same = scores[order], same[order]
    counts = np.ones(len(order)) if weights is None else np.asarray(weights)[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each score
    shares = [np.cumsum(counts * kind)[last] for kind in (same, ~same)]
    true, false = (np.concatenate([[0.0], share / share[-1]]) for share in shares)
    thresholds = np.concatenate([[np.inf], ranked[last]])
    return Verification(thresholds, false, true, num_same, num_different)


def bootstrap_over_identities(
    scores: np.ndarray,
    pairs: Pairs,
    labels: Any,
    *,
    false_accept_rate: float = 0.01,
    num_samples: int = 1000,
    seed: int = 0,
) -> Summary:
    """Return 95% intervals (low, high) over draws of other identities.

    Identities are drawn with replacement: pairs of one identity that is drawn k times
    count k times; pairs of two identities that are drawn k and l times count k l times.
    Pairs that share an identity depend on each other, so that intervals over pairs
    would be too narrow.

    Args:
      scores: [P], of the pairs.
      labels: [N], as given to `draw_pairs`.

    Raises:
      ValueError: fewer than two samples, and what `Verification.true_accepts_at` or
        `receiver_operating_characteristic` refuses.
    """
    check_at_least("num_samples", num_samples, 2)
    identities, y = np.unique(np.asarray(labels), return_inverse=True)
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    scores, same = np.asarray(scores)[order], np.asarray(pairs.same)[order]
    first, second = y[pairs.first[order]], y[pairs.second[order]]
    receiver_operating_characteristic(scores, same)  # there are pairs of both kinds
    rng = np.random.default_rng(seed)
    found: list[Summary] = []
    while len(found) < num_samples:
        drawn = rng.integers(0, len(identities), len(identities))
        times = np.bincount(drawn, minlength=len(identities))
        weights = np.where(same, times[first], times[first] * times[second])
        if not weights[same].any() or not weights[~same].any():
            continue  # no rate can be measured: draw again
        curve = receiver_operating_characteristic(scores, same, weights=weights)
        found.append(curve.summary(false_accept_rate))
    low, high = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    ends = ((float(a), float(b)) for a, b in zip(low, high, strict=True))
    return Summary(*ends)


def draw_pairs(labels: Any, num_pairs: int, *, seed: int = 0) -> Pairs:
    """Draw half the pairs of one identity and half of two, with replacement.

    Args:
      labels: [N], identities of any type.
      num_pairs: P, rounded down to an even number.

    Raises:
      ValueError: fewer than two pairs, fewer than two identities, or no identity with
        two examples.
    """
    identities, y = np.unique(np.asarray(labels), return_inverse=True)
    counts = np.bincount(y, minlength=len(identities))
    check_at_least("num_pairs", num_pairs, 2)
    if len(identities) < 2 or counts.max() < 2:
        raise ValueError(
            f"labels name {len(identities)} identities, with at most "
            f"{counts.max(initial=0)} examples each: give two identities or more, one "
            "of them with two examples"
        )
    rng = np.random.default_rng(seed)
    half, total = num_pairs // 2, len(y)
    # sorted by identity, the examples of each are a range of places
    order = np.argsort(y, kind="stable")
    starts = np.cumsum(counts) - counts
    place = np.empty(total, int)
    place[order] = np.arange(total)

    def partner(first: np.ndarray, *, same: bool) -> np.ndarray:
        identity = y[first]
        start, count = starts[identity], counts[identity]
        if same:
            step = rng.integers(1, count)
            return order[start + (place[first] - start + step) % count]
        return order[(start + count + rng.integers(0, total - count)) % total]

    first_of_same = rng.choice(np.flatnonzero(counts[y] > 1), half)
    first_of_different = rng.integers(0, total, half)
    second = [
        partner(first_of_same, same=True),
        partner(first_of_different, same=False),
    ]
    is_same = np.repeat([True, False], half)
    return Pairs(
        np.concatenate([first_of_same, first_of_different]),
        np.concatenate(second),
        is_same,
    )


def verify(
    learner: Learner,
    state: LearnerState,
    x: Any,
    labels: Any,
    *,
    num_pairs: int = 20_000,
    seed: int = 0,
    similarity: Similarity = "cosine",
    batch_size: int = 256,
) -> Verification:
    """Compare pairs of examples by their embeddings::

        found = verify(learner, params, x, identities)
        found.equal_error_rate, found.true_accepts_at(0.01)

    Args:
      learner: its outputs are the embedding, as in meta-training.
      state: the learner's; of a method that learns its comparison too,
        `metalstm.algorithms.embedding_state` of the meta-parameters.
      x: [N, ...] as in meta-training; uint8 is divided by 255.
      labels: [N], identities of any type, best of people or letters not trained on.
      num_pairs, seed: see `draw_pairs`.
      similarity: cosine, or minus the Euclidean distance.
      batch_size: examples in one jitted call, normalised by the stored averages.

    Raises:
      ValueError: another similarity, as many labels as examples are not given, or what
        `draw_pairs` refuses.
    """
    if len(x) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(x)} examples: give one each")
    pairs = draw_pairs(labels, num_pairs, seed=seed)
    options: dict[str, Any] = {"similarity": similarity, "batch_size": batch_size}
    scores = score_pairs(learner, state, x, pairs, **options)
    return receiver_operating_characteristic(scores, pairs.same)


def score_pairs(
    learner: Learner,
    state: LearnerState,
    x: Any,
    pairs: Pairs,
    *,
    similarity: Similarity = "cosine",
    batch_size: int = 256,
) -> np.ndarray:
    """Return how similar the embeddings of each pair are, [P], higher is more.

    The arguments are those of `verify`.

    Raises:
      ValueError: another similarity.
    """
    check_choice("similarity", similarity, get_args(Similarity))
    embedded = _embed(learner, state, np.asarray(x), batch_size)
    if similarity == "cosine":
        norms = np.linalg.norm(embedded, axis=1, keepdims=True)
        embedded = embedded / np.maximum(norms, 1e-12)
    difference = embedded[pairs.first] - embedded[pairs.second]
    # between unit vectors the distance ranks as the cosine does
    distances = np.linalg.norm(difference, axis=1)
    return 1 - distances**2 / 2 if similarity == "cosine" else -distances


def pool_examples(pool: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples [N, ...] of a `metalstm.data.ClassPool` and their classes."""
    counts = np.asarray(pool.counts)
    return np.asarray(pool.images), np.repeat(np.arange(len(counts)), counts)


def _embed(learner, state, x: np.ndarray, batch_size: int) -> np.ndarray:
    """[N, ...] -> [N, d] float64, in batches of one size."""

    @jax.jit
    def embed(state: LearnerState, x: jax.Array) -> jax.Array:
        outputs, _ = learner.apply(state, x, norm="stored")
        return outputs.reshape(x.shape[0], -1)

    batch_size = min(batch_size, len(x))
    parts = []
    for start in range(0, len(x), batch_size):
        part = x[start : start + batch_size]
        # the last batch is filled up, so that one program serves all
        rows = np.minimum(np.arange(batch_size), len(part) - 1)
        batch = prepare_examples(jnp.asarray(part[rows]), None)
        parts.append(np.asarray(embed(state, batch))[: len(part)])
    return np.concatenate(parts).astype(np.float64)
