"""How sure an answer is: temperature, abstention, conformal label sets.

Pure functions of scores, in numpy. Shapes: E episodes, M queries of each, way classes;
``...`` is any number of axes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from metalstm.checks import check_at_least

__all__ = [
    "Reliability",
    "episode_quantile",
    "fit_temperature",
    "label_sets",
    "probabilities",
    "reliability",
]

_WIDEST = 1e6  # of the inverse temperature, in units of the scores' spread


def probabilities(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return softmax(scores / temperature) over the last axis, in float64.

    >>> probabilities([[0.0, 2.0]], temperature=2.0).round(3)
    array([[0.269, 0.731]])

    Raises:
      ValueError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: choose a number above 0")
    logits = np.asarray(scores, np.float64) / temperature
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def fit_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature T under which softmax(scores / T) fits the labels best.

    T minimises the mean of -log softmax(s / T)_y (Guo et al., 2017, section 4.2). That
    is convex in b = 1 / T, and its derivative E_p[s] - s_y, with p = softmax(b s),
    rises in b; its zero is bisected.

    Args:
      scores: [..., way], of validation queries; higher is better.
      labels: int [...].

    Raises:
      ValueError: shapes that do not fit, scores that are not finite, or scores without
        a best temperature: all labels have the highest score, or the scores say
        nothing of the labels.
    """
    scores, labels = _check_scores(scores, labels)
    scores = scores - scores.max(-1, keepdims=True)
    spread = float(scores.std())
    of_label = np.take_along_axis(scores, labels[..., None], -1)[..., 0]

    def derivative(inverse: float) -> float:
        expected = (probabilities(scores, 1 / inverse) * scores).sum(-1)
        return float((expected - of_label).mean())

    if not of_label.any():
        raise ValueError(
            f"every one of the {labels.size} labels has the highest score, and then no "
            "temperature is best: give more validation episodes, or harder ones"
        )
    low, high = 1 / (_WIDEST * spread), _WIDEST / spread
    if derivative(low) >= 0:
        raise ValueError(
            f"the scores of the {labels.size} labels are no higher than chance: a "
            "temperature needs a method that has learned something"
        )
    for _ in range(60):  # of a logarithm, to the last digit
        middle = math.sqrt(low * high)
        low, high = (middle, high) if derivative(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


class Reliability(NamedTuple):
    """How often answers of a given confidence are right; an empty bin holds NaN."""

    confidence: np.ndarray  # [bins], mean probability of the answers in a bin
    accuracy: np.ndarray  # [bins], share of them that is right
    counts: np.ndarray  # [bins]

    @property
    def calibration_error(self) -> float:
        """Return the expected calibration error.

        It is sum_b n_b / n ``|accuracy - confidence|`` over bins b of n_b answers.

        Guo et al. (2017), equation 3. Of few answers it is above zero by chance alone.

        >>> two = [[0.9, 0.1], [0.8, 0.2]]  # mean confidence 0.85, one of two is right
        >>> round(reliability(two, [0, 1], num_bins=2).calibration_error, 3)
        0.35
        """
        gaps = self.counts * np.abs(self.accuracy - self.confidence)
        return float(np.nansum(gaps) / self.counts.sum())


def reliability(
    probabilities: np.ndarray, labels: np.ndarray, *, num_bins: int = 15
) -> Reliability:
    """Return accuracy by confidence, in ``num_bins`` equal intervals of (0, 1].

    Args:
      probabilities: [..., way].
      labels: int [...].

    Raises:
      ValueError: shapes that do not fit, or no bin.
    """
    check_at_least("num_bins", num_bins, 1)
    probabilities, labels = _check_scores(probabilities, labels)
    confidence = probabilities.max(-1).ravel()
    right = (probabilities.argmax(-1) == labels).ravel()
    bins = np.clip(np.ceil(confidence * num_bins) - 1, 0, num_bins - 1).astype(int)
    counts = np.bincount(bins, minlength=num_bins)
    sums = (np.bincount(bins, values, num_bins) for values in (confidence, right))
    with np.errstate(invalid="ignore"):
        mean_confidence, accuracy = (values / counts for values in sums)
    return Reliability(mean_confidence, accuracy, counts)


def episode_quantile(values: np.ndarray, share: float) -> float:
    """Return the smallest t that at least ``share`` of a new episode's values keep.

    With E validation episodes of M values each, t is the smallest value with

        sum_e sum_m 1{values[e, m] <= t} / (M (E + 1)) >= share:

    the new episode counts as one more, whose values are all above t (Lee, Barber &
    Willett, 2023, hierarchical conformal prediction). For a value v drawn from those of
    the new episode

        P(v <= t) >= share,

    whenever the E + 1 episodes are exchangeable. Nothing is assumed of the values
    within an episode: queries of one episode share a support set, so that the ordinary
    split conformal quantile, over E M values as if independent, promises too much. The
    probability is over the validation episodes and the new one together. It does not
    hold for every class, or for every episode.

    >>> episode_quantile(np.array([[1.0], [2.0], [3.0], [4.0]]), 0.6)  # 3 of 4 + 1
    3.0

    Args:
      values: [E, M], finite.
      share: in (0, 1).

    Raises:
      ValueError: another shape, values that are not finite, a share outside (0, 1), or
        fewer episodes than it needs: share / (1 - share).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"values have shape {list(values.shape)} with "
            f"{int((~np.isfinite(values)).sum())} that are not finite: give finite "
            "[episodes, queries]"
        )
    if not 0 < share < 1:
        raise ValueError(f"share={share}: choose a number in (0, 1)")
    num_episodes, num = values.shape
    # less the rounding of a product that is an integer
    rank = math.ceil(share * (num_episodes + 1) * num - 1e-9)
    if rank > values.size:
        needed = math.ceil(share / (1 - share) - 1e-9)
        raise ValueError(
            f"{num_episodes} episodes are too few for share={share}: give {needed} or "
            "more, or choose a smaller share"
        )
    return float(np.partition(values, rank - 1, axis=None)[rank - 1])


def label_sets(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Return bool [..., way]: the labels whose probability is at least ``threshold``.

    The smallest sets of a given coverage (Sadinle et al., 2019). A set may be empty:
    then no label is likely enough. With -p_y the probability of the true label,
    ``threshold = -episode_quantile(-p_y, coverage)`` gives P(y in set) >= coverage.
    """
    return np.asarray(probabilities) >= threshold


def _check_scores(
    scores: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    way = scores.shape[-1] if scores.ndim else 0
    if scores.ndim < 2 or labels.shape != scores.shape[:-1] or not labels.size:
        raise ValueError(
            f"labels of shape {list(labels.shape)} for scores of shape "
            f"{list(scores.shape)}: give labels [...] and scores [..., way]"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= way:
        raise ValueError(
            f"labels are {labels.dtype} from {labels.min()} to {labels.max()}: give "
            f"integers in [0, {way})"
        )
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{int((~np.isfinite(scores)).sum())} scores are not finite: look at what "
            "the method returns"
        )
    return scores, labels
