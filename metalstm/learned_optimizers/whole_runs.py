"""Evolution over whole runs: compare pairs of perturbed rules by where they end.

Notation: P antithetic pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.base import Array, PyTree, UpdateRule
from metalstm.checks import check_at_least, check_share
from metalstm.learned_optimizers.problems import ProblemFamily
from metalstm.rules import with_progress

__all__ = ["PairedRuns", "make_paired_runs"]

_FLOOR = 0.02  # of the first loss: a loss near zero does not outweigh the others
_WORST = 10.0  # times the first loss: what a run that diverges counts as


class PairedRuns(NamedTuple):
    """What P pairs of runs say of a rule."""

    noises: PyTree  # z, leading [P]; 0 where a parameter is not perturbed
    differences: Array  # [P] score of the first rule minus that of the second
    score: Array  # mean over all runs
    diverged: Array  # share of the runs


def make_paired_runs(
    family: ProblemFamily,
    rule: UpdateRule,
    *,
    num_pairs: int,
    eval_batch: int = 512,
    tell_progress: float = 1.0,
    antithetic: bool = True,
) -> Callable[[PyTree, PyTree, Any, Array, Array], PairedRuns]:
    r"""Compile ``(rule params, std, data, key, num_steps) -> PairedRuns``.

    Each pair trains one instance of ``family`` twice, ``num_steps`` updates from
    theta_0, on the same minibatches, by rules whose parameters are shifted by
    :math:`\pm\sigma z`, z from N(0, I) and sigma = ``std``, a number for each leaf of
    the parameters. A run's score phi is the log of its last loss over its first, plus
    0.02. The antithetic estimate of the meta-gradient (Salimans et al., 2017),

    .. math:: \hat g = z \, (\phi^+ - \phi^-) / (2 \sigma),

    is unbiased for the score smoothed by the noise. Without ``antithetic`` the shifts
    are :math:`\sigma z_1, \sigma z_2`, independent, and z is their difference, over
    sigma: unbiased too, with more variance.

    Args:
      num_pairs: P.
      eval_batch: examples that a first or last loss is the mean over.
      tell_progress: share of the pairs whose rule is told its progress, as by
        `metalstm.rules.with_progress`.
      antithetic: shift the two rules of a pair in opposite directions.

    Raises:
      ValueError: an argument outside these choices.
    """
    check_at_least("num_pairs", num_pairs, 1)
    check_share("tell_progress", tell_progress, zero=True)

    def pair(rule_params, std, data: Any, key: Array, num_steps: Array):
        names = "noise", "task", "init", "batches", "evaluation", "told"
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        task = family.sample(keys["task"], data)
        start = family.init(keys["init"], task)
        held = family.batch(keys["evaluation"], data, eval_batch)
        first = family.loss(start, task, held)
        told = jax.random.bernoulli(keys["told"], tell_progress)
        noise = _noise(keys["noise"], rule_params, std)
        other = jax.tree.map(jnp.negative, noise)
        if not antithetic:
            other = _noise(jax.random.fold_in(keys["noise"], 1), rule_params, std)
        both = jax.tree.map(lambda *z: jnp.stack(z), noise, other)

        def one(noise: PyTree) -> Array:
            shifted = jax.tree.map(lambda w, z, s: w + s * z, rule_params, noise, std)
            tx = with_progress(rule.bind(shifted), None)
            state = tx.init(start)._replace(num_steps=jnp.where(told, num_steps, 0.0))

            def step(t, carry):
                params, state = carry
                batch = family.batch(jax.random.fold_in(keys["batches"], t), data)
                loss, grads = jax.value_and_grad(family.loss)(params, task, batch)
                updates, state = tx.update(grads, state, params, value=loss)
                return jax.tree.map(jnp.add, params, updates), state

            params, _ = lax.fori_loop(0, num_steps, step, (start, state))
            return family.loss(params, task, held)

        last = jax.vmap(one)(both)
        relative = last / first
        bad = ~(relative < _WORST)  # NaN is not below
        scores = jnp.log(jnp.where(bad, _WORST, relative) + _FLOOR)
        if not antithetic:
            noise = jax.tree.map(jnp.subtract, noise, other)
        return noise, scores[0] - scores[1], scores.mean(), bad.mean()

    @jax.jit
    def run(rule_params, std, data, key, num_steps) -> PairedRuns:
        noises, differences, scores, bad = jax.vmap(
            lambda key: pair(rule_params, std, data, key, num_steps)
        )(jax.random.split(key, num_pairs))
        return PairedRuns(noises, differences, scores.mean(), bad.mean())

    return run


def _noise(key: Array, template: PyTree, std: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(template)
    keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))
    return jax.tree.map(
        lambda k, w, s: (s > 0) * jax.random.normal(k, w.shape, w.dtype),
        keys,
        template,
        std,
    )
