"""A classifier that knows when it does not know, fitted on validation episodes.

Shapes: E episodes, M queries of an episode's classes, U of other classes, way classes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from metalstm.base import Batch, Episode, MetaAlgorithm, PyTree
from metalstm.calibration import (
    Reliability,
    episode_quantile,
    fit_temperature,
    label_sets,
    probabilities,
    reliability,
)
from metalstm.checks import check_at_least
from metalstm.data.episodes import Sampler, classes_of, episode_key
from metalstm.data.varying import VaryingEpisodeSpec
from metalstm.meta.evaluation import METHOD_STREAM
from metalstm.statistics import Estimate, mean_and_ci95
from metalstm.tasks import TaskMapping, map_tasks

__all__ = [
    "Answers",
    "Confidence",
    "ConfidenceReport",
    "EpisodeScores",
    "collect_scores",
    "fit_confidence",
    "measure_confidence",
]


class EpisodeScores(NamedTuple):
    """What a method says in each episode; higher is better."""

    known: np.ndarray  # [E, M, way], queries of the episode's classes
    labels: np.ndarray  # int [E, M], theirs
    unknown: np.ndarray  # [E, U, way], queries of classes that are not in the support

    @property
    def accuracies(self) -> np.ndarray:
        """Return the share of correct labels of each episode, [E]."""
        return (self.known.argmax(-1) == self.labels).mean(-1)


def collect_scores(
    algorithm: MetaAlgorithm,
    params: PyTree,
    pool: Any,
    spec: Sampler,
    *,
    num_unknown: int = 0,
    num_episodes: int = 600,
    seed: int = 0,
    split: str = "test",
    batch_size: int = 8,
    task_mapping: TaskMapping | None = None,
) -> EpisodeScores:
    """Adapt to ``num_episodes`` episodes and keep the scores of their queries.

    The episodes are those of `evaluate`. With ``num_unknown`` an episode draws so many
    classes more, whose queries alone are kept: what "none of these" is right for.

    Args:
      spec: with ``num_unknown`` a dataclass whose field ``way`` is the number of
        classes drawn, such as `EpisodeSpec`.
      num_unknown: classes of queries without support.

    Raises:
      ValueError: a regression, or scores that are not finite.
    """
    way = classes_of(spec, jax.eval_shape(spec.sample, jax.random.key(0), pool))
    if way is None:
        raise ValueError(f"spec={spec}: choose classes, a regression has no confidence")
    check_at_least("num_unknown", num_unknown, 0)
    check_at_least("num_episodes", num_episodes, 1)
    if isinstance(spec, VaryingEpisodeSpec):
        raise ValueError(f"spec={spec}: choose tasks of one size (EpisodeSpec)")
    drawn, drawn_way = spec, way + num_unknown
    if num_unknown:
        available = getattr(pool, "num_classes", math.inf)
        if drawn_way > available:
            raise ValueError(
                f"num_unknown={num_unknown} and way={way} are more than the "
                f"{available} classes of the pool: choose fewer"
            )
        drawn = dataclasses.replace(cast("Any", spec), way=drawn_way)
    parts = []
    for start in range(0, num_episodes, batch_size):
        keys = _episode_keys(jnp.arange(start, start + batch_size), seed, split=split)
        episodes = _draw(keys, pool, spec=drawn)
        scores = _scores(
            params,
            keys,
            episodes,
            algorithm=algorithm,
            way=way,
            drawn_way=drawn_way,
            task_mapping=task_mapping,
        )
        parts.append(jax.device_get(scores))
    joined = (np.concatenate(part)[:num_episodes] for part in zip(*parts, strict=True))
    found = EpisodeScores(*joined)
    if not (np.isfinite(found.known).all() and np.isfinite(found.unknown).all()):
        raise ValueError(
            "the method returned scores that are not finite: look at its parameters "
            "and at the examples"
        )
    return found


# Programs of their own, so that validation and test share the costly one, `_scores`.
@functools.partial(jax.jit, static_argnames="split")
def _episode_keys(tasks: jax.Array, seed: Any, *, split: str) -> jax.Array:
    return jax.vmap(lambda task: episode_key(seed, split, 0, task))(tasks)


@functools.partial(jax.jit, static_argnames="spec")
def _draw(keys: jax.Array, pool: Any, *, spec: Sampler) -> Episode:
    return jax.vmap(lambda key: spec.sample(key, pool))(keys)


@functools.partial(
    jax.jit, static_argnames=("algorithm", "way", "drawn_way", "task_mapping")
)
def _scores(
    params: PyTree,
    keys: jax.Array,
    episodes: Episode,
    *,
    algorithm: MetaAlgorithm,
    way: int,
    drawn_way: int,
    task_mapping: TaskMapping | None,
) -> tuple[jax.Array, ...]:
    """Return known scores, their labels, and unknown scores, each with leading [E]."""

    def known_first(batch: Batch) -> tuple[Batch, int]:
        order = jnp.argsort(batch.y >= way, stable=True)
        num_known = len(batch.y) * way // drawn_way
        return jax.tree.map(lambda leaf: leaf[order], batch), num_known

    def one(key: jax.Array, episode: Episode) -> tuple[jax.Array, ...]:
        support, num_support = known_first(episode.support)
        query, num_known = known_first(episode.query)
        support = jax.tree.map(lambda leaf: leaf[:num_support], support)
        key = jax.random.fold_in(key, METHOD_STREAM)
        scores = algorithm.predict(params, key, support, query.x, num_classes=way)
        return scores[:num_known], query.y[:num_known], scores[num_known:]

    return map_tasks(one, keys, episodes, how=task_mapping)


class Answers(NamedTuple):
    """What a classifier says to queries with scores [..., way]."""

    labels: np.ndarray  # int [...], -1: none of these
    probabilities: np.ndarray  # [..., way]
    sets: np.ndarray  # bool [..., way], the labels that may be right


class Confidence(NamedTuple):
    """Three numbers that turn scores into answers; `fit_confidence` finds them."""

    temperature: float
    known_threshold: float
    """The least highest score of a query that is given a label."""
    set_threshold: float
    """The least probability of a label in a set."""

    def answer(self, scores: np.ndarray) -> Answers:
        """Return labels, probabilities and label sets of scores [..., way]."""
        scores = np.asarray(scores, np.float64)
        likely = probabilities(scores, self.temperature)
        known = scores.max(-1) >= self.known_threshold
        labels = np.where(known, scores.argmax(-1), -1)
        return Answers(labels, likely, label_sets(likely, self.set_threshold))


def fit_confidence(
    validation: EpisodeScores,
    *,
    false_alarm_rate: float = 0.05,
    coverage: float = 0.95,
) -> Confidence:
    """Fit temperature, abstention and label sets on validation episodes.

    The temperature is fitted on every other episode and the sets on the rest, so that
    no probability in a set's threshold was fitted to the label it is compared with. For
    a query drawn from those of a new episode's classes

        P(its label is in the set)          >= coverage
        P(it is answered "none of these")   <= false_alarm_rate

    if the validation episodes and the new one are exchangeable: drawn alike, with
    independent classes (`calibration.episode_quantile`). Episodes drawn from one finite
    pool of classes are exchangeable with each other. For new classes the two hold as
    far as these are like the validation classes, and are averages over classes: few
    validation classes make them rough. Nothing is promised for a particular class, nor
    for how many unknown queries are noticed: `measure_confidence` measures it.

    Args:
      validation: of the method, way and shot that it is used with.
      false_alarm_rate: of queries of the episode's classes.
      coverage: of the label sets.

    Raises:
      ValueError: too few episodes for the rates (about 2 / (1 - coverage), or
        1 / false_alarm_rate), or scores that no temperature fits.
    """
    for name, value in (("false_alarm_rate", false_alarm_rate), ("coverage", coverage)):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value}: choose a number in (0, 1)")
    known, labels, _ = validation
    check_at_least("validation's number of episodes", len(known), 2)
    temperature = fit_temperature(known[::2], labels[::2])
    likely = probabilities(known[1::2], temperature)
    of_label = np.take_along_axis(likely, labels[1::2, :, None], -1)[..., 0]
    highest = known.max(-1)
    return Confidence(
        temperature=temperature,
        known_threshold=-episode_quantile(-highest, 1 - false_alarm_rate),
        set_threshold=-episode_quantile(-of_label, coverage),
    )


class ConfidenceReport(NamedTuple):
    """Shares in [0, 1], over episodes."""

    accuracy: Estimate  # of the highest score, nothing abstained
    reliability: Reliability  # of all known queries; has the calibration error
    coverage: Estimate  # labels in their sets
    set_size: Estimate  # labels in a set
    false_alarms: Estimate  # known queries answered "none of these"
    misses: Estimate  # unknown queries given a label; NaN without any

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy.percent:.1f} %, "
            f"calibration error {100 * self.reliability.calibration_error:.1f} %, "
            f"coverage {self.coverage.percent:.1f} % by {self.set_size:.2f} labels, "
            f"false alarms {self.false_alarms.percent:.1f} %, "
            f"misses {self.misses.percent:.1f} %"
        )


def measure_confidence(test: EpisodeScores, confidence: Confidence) -> ConfidenceReport:
    """Measure on held-out episodes what `fit_confidence` fitted on validation ones."""
    answers = confidence.answer(test.known)
    covered = np.take_along_axis(answers.sets, test.labels[..., None], -1)[..., 0]

    def over_episodes(values: np.ndarray) -> Estimate:
        return mean_and_ci95(values.mean(-1))

    misses = Estimate(np.nan, np.nan)
    if test.unknown.shape[1]:
        misses = over_episodes(confidence.answer(test.unknown).labels >= 0)
    return ConfidenceReport(
        accuracy=mean_and_ci95(test.accuracies),
        reliability=reliability(answers.probabilities, test.labels),
        coverage=over_episodes(covered),
        set_size=over_episodes(answers.sets.sum(-1)),
        false_alarms=over_episodes(answers.labels < 0),
        misses=misses,
    )
