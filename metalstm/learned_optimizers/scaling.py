"""Augmentation: the same problems in other units."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from metalstm.base import Array, PyTree
from metalstm.checks import check_choice
from metalstm.learned_optimizers.problems import (
    ProblemFamily,
    check_range,
    log_uniform,
)

__all__ = ["with_random_scaling"]


class _Scaled(NamedTuple):
    task: PyTree
    scales: PyTree  # c, like the parameters
    loss_scale: Array  # a


def with_random_scaling(
    family: ProblemFamily,
    low: float,
    high: float,
    *,
    per: Literal["coordinate", "tensor", "problem"] = "coordinate",
    loss: tuple[float, float] = (1.0, 1.0),
) -> ProblemFamily:
    """Minimise a L(c phi) over phi: the same problems, scaled at random.

    c and a are log-uniform and drawn with the instance (Lv et al., 2017, whose range of
    c is e^-3 to e^3). An optimizer trained on it cannot rely on one step size.

    Args:
      low, high: the range of c.
      per: a c for every coordinate, one for each tensor, or one for all parameters.
      loss: the range of a.

    Raises:
      ValueError: a range that is not 0 < low <= high, or another ``per``.
    """
    check_range("low, high", (low, high))
    check_range("loss", loss)
    check_choice("per", per, ("coordinate", "tensor", "problem"))

    def sample(key: Array, data: PyTree) -> PyTree:
        task_key, scale_key = jax.random.split(key)
        task = family.sample(task_key, data)
        shapes = jax.eval_shape(family.init, key, task)
        leaves, treedef = jax.tree.flatten(shapes)

        def scale(k: int, leaf: jax.ShapeDtypeStruct) -> Array:
            which = jax.random.fold_in(scale_key, 0 if per == "problem" else k)
            shape = leaf.shape if per == "coordinate" else ()
            return log_uniform(which, (low, high), shape).astype(leaf.dtype)

        scales = [scale(k, leaf) for k, leaf in enumerate(leaves)]
        loss_scale = log_uniform(jax.random.fold_in(key, len(leaves)), loss)
        return _Scaled(task, jax.tree.unflatten(treedef, scales), loss_scale)

    def init(key: Array, task: PyTree) -> PyTree:
        params = family.init(key, task.task)
        return jax.tree.map(jnp.divide, params, task.scales)

    def scaled_loss(params: PyTree, task: PyTree, batch: PyTree) -> Array:
        theta = jax.tree.map(jnp.multiply, params, task.scales)
        return task.loss_scale * family.loss(theta, task.task, batch)

    return ProblemFamily(sample, init, family.batch, scaled_loss)
