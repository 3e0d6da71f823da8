"""Meta-test: the same episodes for every method, a mean and its interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from metalstm.algorithms.common import accuracy, squared_errors
from metalstm.base import Episode, LearnerState, MetaAlgorithm, PyTree
from metalstm.batches import mask_of
from metalstm.data.episodes import (
    Sampler,
    classes_of,
    episode_key,
    sample_checked,
)
from metalstm.data.varying import check_masked
from metalstm.runtime import sharding
from metalstm.runtime.compilation import Jitted
from metalstm.statistics import Estimate, mean_and_ci95
from metalstm.tasks import TaskMapping, map_tasks

__all__ = [
    "METHOD_STREAM",
    "Evaluation",
    "evaluate",
    "make_evaluate",
    "paired_difference",
]

METHOD_STREAM = 103  # folded into an episode's key: randomness inside the method


class Evaluation(NamedTuple):
    """Accuracies in [0, 1] (for regression: minus the mean squared error).

    >>> errors = np.array([[1.0, 4.0], [1.0, 8.0]])
    >>> result = Evaluation(-errors.mean(1), -3.5, 1.96, None, "test", 0, errors)
    >>> str(result).split(" (")[0]
    'mean squared error 3.5 ± 2, by target 1 ± 0, 6 ± 3.9'
    """

    accuracies: np.ndarray  # float32 [episodes]
    mean: float
    ci95: float  # half the 95% confidence interval over episodes: 1.96 std / sqrt(n)
    query_norm: str | None  # None: no batch norm
    split: str
    seed: int
    errors: np.ndarray | None = None  # of a regression: float32 [episodes, targets]

    @property
    def regression(self) -> bool:
        return self.errors is not None

    @property
    def by_target(self) -> list[Estimate]:
        """The mean squared error of each target; empty for a classification."""
        return [] if self.errors is None else [*map(mean_and_ci95, self.errors.T)]

    def __str__(self) -> str:
        norm = self.query_norm or "no batch norm"
        if self.regression:
            score = f"mean squared error {-self.mean:.4g} ± {self.ci95:.2g}"
            if len(self.by_target) > 1:
                each = (f"{mean:.4g} ± {ci95:.2g}" for mean, ci95 in self.by_target)
                score = f"{score}, by target {', '.join(each)}"
        else:
            score = f"{100 * self.mean:.2f} ± {100 * self.ci95:.2f} %"
        return f"{score} ({len(self.accuracies)} {self.split} episodes, {norm})"


class _Scores(NamedTuple):
    accuracies: jax.Array  # [episodes]
    errors: jax.Array | None  # [episodes, targets] of a regression


def make_evaluate(
    algorithm: MetaAlgorithm,
    spec: Sampler,
    *,
    batch_size: int = 8,
    task_mapping: TaskMapping | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., Evaluation]:
    """Compile once, evaluate often: ``(params, pool, num_episodes=, seed=, split=)``.

    Args:
      batch_size: episodes in one jitted call.
      task_mapping: how they are laid out; see `metalstm.tasks.map_tasks`.
      mesh: spreads the episodes of a batch over its ``"task"`` axis, of which the batch
        becomes a multiple: the same accuracies. See `runtime.sharding.task_mesh`.
    """

    check_masked(algorithm, spec)
    if mesh is not None:
        batch_size = mesh.size * math.ceil(batch_size / mesh.size)

    def sample(keys: jax.Array, pool: Any) -> Episode:
        return jax.vmap(lambda key: sample_checked(spec, key, pool))(_typed(keys))

    def score(params: PyTree, keys: jax.Array, episodes: Episode) -> _Scores:
        classes = classes_of(spec, episodes)

        def one(key: jax.Array, episode: Episode) -> _Scores:
            key = jax.random.fold_in(key, METHOD_STREAM)
            support, query = episode
            scores = algorithm.predict(
                params, key, support, query.x, num_classes=classes
            )
            answers = scores, query.y, mask_of(query)
            errors = squared_errors(*answers) if classes is None else None
            return _Scores(accuracy(*answers), errors)

        return map_tasks(one, _typed(keys), episodes, how=task_mapping)

    if mesh is not None:
        task, same = P("task"), P()
        sample = sharding.spread(sample, mesh, (task, same), task)
        score = sharding.spread(score, mesh, (same, task, task), task)
    # Two programs, so that the costly one does not depend on the size of the pool.
    draw, grade = jax.jit(sample), Jitted(_on_every_device(mesh, score))

    def run(
        params: PyTree,
        pool: Any,
        *,
        num_episodes: int = 600,
        seed: int = 0,
        split: str = "test",
    ) -> Evaluation:
        if num_episodes < 2:
            raise ValueError(f"num_episodes={num_episodes}: choose at least 2")
        params, pool = (sharding.place(tree, mesh) for tree in (params, pool))
        results = []
        for start in range(0, num_episodes, batch_size):
            # the last batch runs past the end, so that one program serves all
            tasks = jnp.arange(start, start + batch_size)
            typed = jax.vmap(lambda i: episode_key(seed, split, 0, i))(tasks)
            keys = sharding.place(jax.random.key_data(typed), mesh, per_task=True)
            results.append(grade(params, keys, draw(keys, pool)))
            sharding.block_on_cpu_collectives(results[-1])
        joined = jax.tree.map(
            lambda *parts: np.concatenate(parts)[:num_episodes],
            *jax.device_get(results),
        )
        accuracies, errors = joined
        if np.isinf(accuracies).any() and errors is None:
            raise ValueError(
                "the sampler draws queries whose labels are outside [0, way), or more "
                "than the learner's outputs: give labels 0 .. way - 1"
            )
        mean, ci95 = mean_and_ci95(accuracies)
        norm = algorithm.query_norm if _has_statistics(params) else None
        return Evaluation(accuracies, mean, ci95, norm, split, seed, errors)

    return run


def _typed(keys: jax.Array) -> jax.Array:
    # raw until they are where they are used: typed keys are not placed
    return jax.random.wrap_key_data(keys)


def _has_statistics(params: PyTree) -> bool:
    """Whether a learner has batch statistics; True where no learner is known."""
    is_state = lambda part: isinstance(part, LearnerState)  # noqa: E731
    parts = jax.tree.leaves(params, is_leaf=is_state)
    states = [part for part in parts if is_state(part)]
    return not states or any(jax.tree.leaves(state.stats) for state in states)


def _on_every_device(mesh: Mesh | None, score: Callable) -> Callable:
    """Scores that each process can read."""
    if mesh is None:
        return score

    def gathered(*args: Any) -> _Scores:
        every = jax.sharding.NamedSharding(mesh, P())
        return jax.lax.with_sharding_constraint(score(*args), every)

    return gathered


def evaluate(
    algorithm: MetaAlgorithm,
    params: PyTree,
    pool: Any,
    spec: Sampler,
    *,
    num_episodes: int = 600,
    seed: int = 0,
    split: str = "test",
    **options: Any,
) -> Evaluation:
    """Adapt to and score ``num_episodes`` episodes; ``options`` of `make_evaluate`.

    Episode i is a function of (seed, split, i) alone: every method sees the same ones.
    """
    run = make_evaluate(algorithm, spec, **options)
    return run(params, pool, num_episodes=num_episodes, seed=seed, split=split)


def paired_difference(a: Evaluation, b: Evaluation) -> Estimate:
    """Mean and 95% half-interval of ``a - b`` on the same episodes.

    Raises:
      ValueError: the two did not see the same episodes.
    """
    same = (a.split, a.seed, len(a.accuracies)) == (b.split, b.seed, len(b.accuracies))
    if not same:
        raise ValueError(
            f"paired difference of different episodes: {len(a.accuracies)} of "
            f"{a.split} seed {a.seed} against {len(b.accuracies)} of {b.split} seed "
            f"{b.seed}"
        )
    return mean_and_ci95(a.accuracies - b.accuracies)
