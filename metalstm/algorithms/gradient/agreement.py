"""Weigh the tasks of a meta-step by how far their gradients agree."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metalstm.base import Array, Episode, MetaAlgorithm, PyTree
from metalstm.records import recorded
from metalstm.tasks import TaskMapping, map_tasks

__all__ = ["gradient_agreement"]


@recorded("algorithm")
def gradient_agreement(
    algorithm: MetaAlgorithm, *, task_mapping: TaskMapping | None = None
) -> MetaAlgorithm:
    r"""Weigh tasks by gradient agreement (Eshratifar et al., 2018, equation 5).

    The meta-gradient of T tasks is the sum of w_i g_i with

    .. math:: w_i = \sum_j g_i \cdot g_j \, / \, \sum_k | \sum_j g_k \cdot g_j |

    so that a task whose gradient opposes the others' counts little, or negatively. The
    weights' absolute values sum to one; with one task nothing changes.

    Args:
      algorithm: whose gradient of one task is g_i: `reptile` (the paper's), `maml` or
        any other that `meta_gradient` serves.
      task_mapping: see `metalstm.tasks.map_tasks`.

    Returns:
      ``algorithm`` with that ``meta_gradient``. The tasks of one chunk
      (``accumulate_tasks=``) or of one device are weighed among themselves.

    Raises:
      ValueError: nothing is learned, or each task has a carry of its own.
    """
    if not algorithm.trainable or algorithm.per_task_carry:
        raise ValueError(
            "gradient_agreement weighs the gradients of tasks drawn for one "
            "meta-step: give it an algorithm that is meta-trained and keeps no state "
            "of each task"
        )

    def meta_gradient(meta_params: PyTree, carry: PyTree, keys: Array, tasks: Episode):
        def one(key: Array, episode: Episode):
            alone = jax.tree.map(lambda leaf: leaf[None], (key, episode))
            return algorithm.meta_gradient(meta_params, carry, *alone)

        grads, carry, metrics = map_tasks(one, keys, tasks, how=task_mapping)
        weights = agreement_weights(grads)
        grads = jax.tree.map(lambda g: jnp.tensordot(weights, g, axes=1), grads)
        # averages over meta-training continue from one carry, so their mean is that of
        # all tasks at once
        carry, metrics = jax.tree.map(lambda leaf: leaf.mean(0), (carry, metrics))
        metrics["tasks_against"] = (weights < 0).mean()
        return grads, carry, metrics

    return algorithm._replace(meta_gradient=meta_gradient)


def agreement_weights(grads: PyTree) -> Array:
    """Weigh gradients with a leading [T] by equation 5: weights [T].

    >>> agreement_weights(jnp.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
    Array([ 0.33333334,  0.33333334, -0.33333334], dtype=float32)
    """
    total = jax.tree.map(lambda g: g.sum(0), grads)
    products = sum(
        jnp.tensordot(g.reshape(g.shape[0], -1), s.ravel(), axes=1)
        for g, s in zip(jax.tree.leaves(grads), jax.tree.leaves(total), strict=True)
    )
    return products / jnp.maximum(jnp.abs(products).sum(), 1e-30)
