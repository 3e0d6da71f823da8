"""Implicit MAML: differentiate the end of an inner loop without its path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg

from metalstm.algorithms.common import accuracy, task_loss
from metalstm.algorithms.gradient.adaptation import gradient_scale, support_metrics
from metalstm.algorithms.gradient.engine import learned_init, with_gradient_of_init
from metalstm.algorithms.gradient.published import fixed_sgd
from metalstm.base import (
    Array,
    Batch,
    Episode,
    Learner,
    LearnerState,
    MetaAlgorithm,
    MetaParams,
    PyTree,
    QueryNorm,
    UpdateRule,
)
from metalstm.checks import check_at_least, check_choice, check_positive
from metalstm.inner import first_order
from metalstm.records import recorded
from metalstm.rules import as_rule

__all__ = ["implicit_maml", "proximal_pull"]


def proximal_pull(strength: float) -> optax.GradientTransformation:
    """Add the gradient of strength / 2 ||theta_t - theta_0||^2 to the updates."""

    def update(updates: PyTree, start: PyTree, params: PyTree | None = None):
        if params is None:
            raise ValueError(
                "proximal_pull needs params: call update(g, state, params)"
            )
        pulled = jax.tree.map(
            lambda g, p, s: g + strength * (p - s), updates, params, start
        )
        return pulled, start

    return optax.GradientTransformation(lambda params: params, update)


@recorded("algorithm")
def implicit_maml(
    learner: Learner,
    rule: UpdateRule | optax.GradientTransformation | float = 0.1,
    *,
    strength: float = 2.0,
    num_steps: int = 16,
    cg_steps: int = 5,
    train_query_norm: QueryNorm = "transductive",
    **options: Any,
) -> MetaAlgorithm:
    """Implicit MAML (Rajeswaran et al., 2019): a proximal loop, an implicit gradient.

    The inner loop minimises s L_support(phi) + strength / 2 ||phi - theta_0||^2
    (equation 3, where s, the ``gradient_scale``, is 1). At its minimum phi* the
    meta-gradient needs no path (lemma 1):

        d L_query / d theta_0 = (I + s H / strength)^-1 grad L_query(phi*),

    H the Hessian of the support loss at phi*, by ``cg_steps`` steps of conjugate
    gradient. Memory does not grow with ``num_steps``. Where the inner loop stops early
    or H is far from positive definite, the answer is an approximation. The loop
    diverges from a rate of 2 / (h + strength) on, h the largest eigenvalue of s H.

    Args:
      learner: as in `learned_init`.
      rule: of the inner loop; a number is SGD's rate. Its parameters are not learned.
      strength: lambda, the pull towards theta_0. Published: 2 (Omniglot), 0.5 (mini).
        With ``gradient_scale="way"`` five times as much is the same at five ways.
      num_steps: T, in meta-training and, unless ``num_test_steps`` differs, at test.
      cg_steps: steps of conjugate gradient.
      train_query_norm: transductive or support.
      options: further arguments of `learned_init`.

    Raises:
      ValueError: a strength that is not positive, no CG step, or another
        ``train_query_norm``.
    """
    check_positive("strength", strength)
    check_at_least("cg_steps", cg_steps, 1)
    check_choice("train_query_norm", train_query_norm, ("transductive", "support"))
    if options.get("query_norm") == "frozen":
        raise ValueError(
            "implicit_maml gathers no averages over meta-training for "
            "query_norm='frozen': choose support, support+1 or transductive"
        )
    if not isinstance(rule, UpdateRule | optax.GradientTransformation):
        rule = fixed_sgd(rule)
    rule = as_rule(rule)
    train_way: Any = options.get("train_way")
    scale: Any = options.get("gradient_scale", 1.0)
    num_test_steps = options.pop("num_test_steps", None)

    def bind(rule_params: PyTree) -> optax.GradientTransformationExtraArgs:
        tx = optax.chain(proximal_pull(strength), rule.bind(rule_params))
        return optax.with_extra_args_support(tx)

    pulled = UpdateRule(rule.init, bind)
    fixed: dict[str, Any] = {"differentiation": first_order(), **options}
    inner = learned_init(learner, pulled, num_steps=num_steps, **fixed)
    at_way, adapt = learner.at_way, cast(Any, inner.adapt)
    tested = learned_init(
        learner, pulled, num_steps=num_steps, num_test_steps=num_test_steps, **fixed
    )

    def query_outputs(state: LearnerState, support: Batch, query: Batch) -> Array:
        if train_query_norm == "transductive":
            return learner.apply(state, query.x, norm="batch")[0]
        _, gathered = learner.apply(state, support.x, norm="gather")
        return learner.apply(gathered, query.x, norm="stored")[0]

    def one_task(meta_params: MetaParams, key: Array, episode: Episode):
        support, query = episode
        end, trace = adapt(meta_params, key, support, num_classes=train_way)
        state = LearnerState(end.params, end.stats, meta_params.learner.other)
        factor: Array | float
        if scale == "calibrated":
            factor = jnp.exp(meta_params.rule[0])
        else:
            batch_size = options.get("batch_size")
            factor = gradient_scale(scale, learner, state, support, batch_size)

        def support_loss(phi: PyTree) -> Array:
            outputs, _ = learner.apply(
                state._replace(params=phi), support.x, norm="batch"
            )
            return factor * task_loss(outputs, support.y)

        def query_loss(phi: PyTree):
            outputs = query_outputs(state._replace(params=phi), support, query)
            return task_loss(outputs, query.y), accuracy(outputs, query.y)

        (loss, correct), slope = jax.value_and_grad(query_loss, has_aux=True)(
            end.params
        )
        grads = _implicit_gradient(
            support_loss, end.params, slope, strength=strength, cg_steps=cg_steps
        )
        if at_way is not None:
            start = meta_params.learner.params
            _, pull_back = jax.vjp(lambda p: at_way(p, train_way), start)
            (grads,) = pull_back(grads)
        metrics = support_metrics(trace, options.get("batch_size"))
        return (grads, ()), metrics | {"loss": loss, "accuracy": correct}

    return with_gradient_of_init(
        tested,
        one_task,
        train_sampler=tested.train_sampler,
        task_mapping=options.get("task_mapping"),
    )


def _implicit_gradient(
    support_loss: Callable[[PyTree], Array],
    phi: PyTree,
    slope: PyTree,
    *,
    strength: float,
    cg_steps: int,
) -> PyTree:
    """(I + H / strength)^-1 slope, H the Hessian of ``support_loss`` at ``phi``."""

    def product(vector: PyTree) -> PyTree:
        _, curved = jax.jvp(jax.grad(support_loss), (phi,), (vector,))
        return jax.tree.map(lambda v, h: v + h / strength, vector, curved)

    return cg(product, slope, tol=0.0, maxiter=cg_steps)[0]
