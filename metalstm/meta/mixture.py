"""Meta-train one rule on several families of problems, each with its own shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalstm.base import Array, MetaAlgorithm
from metalstm.checks import check_at_least, check_positive
from metalstm.data.episodes import TaskSampler
from metalstm.meta.step import TrainState, init_train_state, make_train_loop

__all__ = ["MixturePart", "init_mixture_state", "make_mixture_loop", "part_of_step"]


class MixturePart(NamedTuple):
    """A family, and how the rule's gradient is estimated on it."""

    algorithm: MetaAlgorithm  # of `learned_optimizer`; the same rule in every part
    sampler: TaskSampler
    num_tasks: int  # as given to `learned_optimizer`
    weight: float = 1.0  # how often a meta-step is this part's, relative to the others


def init_mixture_state(
    parts: Sequence[MixturePart],
    optimizer: optax.GradientTransformation,
    seed: int | Array,
    pools: Sequence[Any],
) -> TrainState:
    """Start meta-training: one rule and optimizer, a carry for each part.

    Args:
      parts: at least one, of a rule whose parameters do not depend on the problem.
      optimizer: of the rule's parameters.
      seed: of initialisation and of all that is drawn.
      pools: each part's data.

    Raises:
      ValueError: no parts, or not a pool for each.
    """
    check_at_least("len(parts)", len(parts), 1)
    keys = [jax.random.fold_in(jax.random.key(seed), k) for k in range(len(parts))]
    draws = [
        part.sampler.sample(key, pool)
        for part, key, pool in zip(parts, keys, pools, strict=True)
    ]
    state = init_train_state(parts[0].algorithm, optimizer, seed, draws[0])
    carries = [
        part.algorithm.init_carry(key, state.params, draw)
        for part, key, draw in zip(parts, keys, draws, strict=True)
    ]
    # copies: a train step donates its state, which may hold no buffer twice
    return jax.tree.map(jnp.array, state._replace(carry=tuple(carries)))


def make_mixture_loop(
    parts: Sequence[MixturePart], optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Sequence[Any]], tuple[TrainState, dict[str, Array]]]:
    """``(state, pools) -> (state, metrics [1])``, a meta-step of the part it draws.

    The part is a function of the state's seed and step alone, so a resumed run draws
    what the uninterrupted one does. Each part is a program of its own, compiled when it
    is first drawn. Use it as the ``train_loop`` of `metalstm.fit`.

    Raises:
      ValueError: no parts, or a weight that is not positive.
    """
    check_at_least("len(parts)", len(parts), 1)
    for part in parts:
        check_positive("weight", part.weight)
    loops = [
        make_train_loop(
            part.algorithm, optimizer, part.sampler, num_tasks=part.num_tasks
        )
        for part in parts
    ]
    weights = [part.weight for part in parts]

    def run(state: TrainState, pools: Sequence[Any]):
        k = part_of_step(weights, int(state.seed), int(state.step))
        carries = list(state.carry)
        new, metrics = loops[k](state._replace(carry=carries[k]), pools[k])
        carries[k] = new.carry
        return new._replace(carry=tuple(carries)), metrics

    return run


def part_of_step(weights: Sequence[float], seed: int, step: int) -> int:
    """Draw the part of a meta-step, with probabilities proportional to ``weights``.

    >>> [part_of_step([1.0, 3.0], 0, step) for step in range(4)]
    [1, 1, 0, 1]
    """
    shares = np.asarray(weights, np.float64)
    rng = np.random.default_rng([seed, step])
    return int(rng.choice(len(shares), p=shares / shares.sum()))
