"""The engine of methods that adapt by gradients: the query loss after T updates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metalstm.algorithms.common import (
    accuracy,
    make_algorithm,
    resampled,
    stop_statistics,
    task_loss,
    with_running_statistics,
)
from metalstm.algorithms.gradient.adaptation import (
    Adaptation,
    adapt_to,
    query_outputs,
    step_scale,
    support_metrics,
)
from metalstm.base import (
    Array,
    Aux,
    Batch,
    Episode,
    Learner,
    LearnerState,
    MetaAlgorithm,
    MetaParams,
    PyTree,
    QueryNorm,
    TrainSampler,
    UpdateRule,
)
from metalstm.batches import first_example, mask_of
from metalstm.checks import check_choice
from metalstm.inner import Differentiation, InnerState, Trace
from metalstm.records import recorded
from metalstm.rules import as_rule, chain, find_gates, learned_scale
from metalstm.rules.classic import check_differentiable
from metalstm.tasks import TaskMapping, mean_over_tasks

__all__ = ["learned_init", "with_gradient_of_init"]


@recorded("algorithm")
def learned_init(
    learner: Learner,
    rule: UpdateRule | optax.GradientTransformation,
    *,
    num_steps: int,
    differentiation: Differentiation,
    query_norm: QueryNorm = "support",
    train_query_norm: QueryNorm = "transductive",
    support_stats: Literal["final", "moving"] = "final",
    frozen_stats: Literal["gathered", "kept"] = "gathered",
    num_test_steps: int | None = None,
    learn_init: bool = True,
    batch_size: int | None = None,
    gradient_scale: float | Literal["1/batch", "way", "calibrated"] = 1.0,
    train_way: int | None = None,
    train_queries: int | None = None,
    trainable: bool = True,
    scan_unroll: int = 1,
    task_mapping: TaskMapping | None = None,
    axis_name: str | None = None,
) -> MetaAlgorithm:
    """Adapt ``learner`` to the support set by ``num_steps`` updates of ``rule``.

    Meta-learned: theta_0 (unless ``learn_init=False``) and the rule's parameters.
    Objective: the query loss at theta_T.

    Args:
      learner: a flax module made pure by `metalstm.nn.from_flax`.
      rule: any `UpdateRule`, or an optax transform.
      num_steps: T, updates on the support set.
      differentiation: `metalstm.first_order` or `metalstm.second_order`.
      query_norm: which statistics normalise a query at meta-test; `base.QueryNorm`.
      train_query_norm: likewise in meta-training. Published: the query batch's own.
      support_stats: how ``support`` gathers: ``"final"``, one more pass over the
        support set at theta_T; ``"moving"``, the module's moving average over the T
        passes at theta_0 .. theta_{T-1} (Ravi & Larochelle).
      frozen_stats: where ``frozen`` has its statistics from: ``"gathered"``, averages
        over meta-training; ``"kept"``, those that a trained theta_0 brings along
        (`metalstm.init_train_state`'s ``start``).
      num_test_steps: T at meta-test, when it differs.
      learn_init: False draws theta_0 afresh for every episode, so that the rule's
        parameters fit learners of any size.
      batch_size: images of the support set in one update, in a new random order each
        epoch. None: all of them.
      gradient_scale: what the gradient is multiplied by before the rule sees it;
        ``"1/batch"``: by 1 / images in the update, on top of the mean loss (the
        authors' code); ``"way"``: by the number of classes, so that a class moves its
        part of the head as far in a task of many classes as in one of few;
        ``"calibrated"``: by the step size with which T updates of gradient descent from
        drawn theta, on the support set, lower the first episode's query loss most. It
        is a parameter of the rule, `rules.learned_scale`, and is meta-learned from
        there.
      train_way: meta-train on tasks with this many classes; needs a learner with
        ``at_way``, that is, a head whose classes share their start.
      train_queries: queries a class in meta-training, when they differ from the test's.
      trainable: False for a baseline that is never meta-trained.
      scan_unroll: see `metalstm.inner.unroll`.
      task_mapping: see `metalstm.tasks.map_tasks`.
      axis_name: a mesh axis whose devices share each task: see `metalstm.inner.unroll`.

    Raises:
      ValueError: at construction for an argument outside its choices or for
        ``truncate_every`` (the query loss would not depend on theta_0); from ``init``
        for a rule that cannot be differentiated at a zero gradient in second order
        (stock Adam); from ``predict`` when the task's way is not the head's.
    """
    rule = as_rule(rule)
    calibrated_by = num_steps if gradient_scale == "calibrated" else None
    if gradient_scale == "calibrated":
        rule, gradient_scale = chain(learned_scale(), rule), 1.0
    adaptation = Adaptation(
        learner,
        rule,
        differentiation,
        support_stats,
        learn_init,
        batch_size,
        gradient_scale,
        scan_unroll,
        axis_name,
        gathers="frozen" in (query_norm, train_query_norm)
        and frozen_stats == "gathered",
    )
    check_choice("frozen_stats", frozen_stats, ("gathered", "kept"))
    check_choice("query_norm", query_norm, get_args(QueryNorm))
    check_choice("train_query_norm", train_query_norm, get_args(QueryNorm))
    _check(adaptation, train_way)
    test_steps = num_steps if num_test_steps is None else num_test_steps
    loss = functools.partial(
        _query_loss,
        adaptation,
        num_steps=num_steps,
        norm=train_query_norm,
        way=train_way,
    )
    slots: dict[str, Any] = {}
    if adaptation.gathers:
        slots = with_running_statistics(
            loss,
            read=lambda p: p.learner.stats,
            write=lambda p, stats: p._replace(learner=p.learner._replace(stats=stats)),
            task_mapping=task_mapping,
        )
    return make_algorithm(
        init=functools.partial(
            _init,
            adaptation,
            calibrated_by=calibrated_by,
            way=train_way,
            trainable=trainable,
        ),
        loss=loss,
        predict=functools.partial(
            _predict, adaptation, num_steps=test_steps, norm=query_norm
        ),
        adapt=functools.partial(
            _adapt, adaptation, num_steps=test_steps, norm=query_norm
        ),
        train_sampler=resampled(way=train_way, queries=train_queries),
        query_norm=query_norm,
        # a number of examples in the loop's own numbers is that of all rows
        masked=batch_size is None and not isinstance(gradient_scale, str),
        trainable=trainable,
        task_mapping=task_mapping,
        **slots,
    )


def with_gradient_of_init(
    tested: MetaAlgorithm,
    gradient: Callable[
        [MetaParams, Array, Episode], tuple[tuple[PyTree, PyTree], dict[str, Array]]
    ],
    *,
    train_sampler: TrainSampler,
    task_mapping: TaskMapping | None,
    carries_rule: bool = False,
) -> MetaAlgorithm:
    """Return an algorithm tested as ``tested`` that meta-trains theta_0 alone.

    Args:
      tested: a `learned_init`.
      gradient: ``(meta_params, key, episode) -> ((gradient by theta_0, rule),
        metrics)`` of one task. The meta-gradient is its mean over tasks, and zero
        elsewhere.
      train_sampler: of `MetaAlgorithm`.
      task_mapping: see `metalstm.tasks.map_tasks`.
      carries_rule: the rule's parameters become the mean over tasks of the ``rule``
        that ``gradient`` returns, which is otherwise ``()``.
    """

    def meta_gradient(meta_params: MetaParams, carry, keys: Array, episodes: Episode):
        (by_init, carry), metrics = mean_over_tasks(
            lambda key, episode: gradient(meta_params, key, episode),
            keys,
            episodes,
            how=task_mapping,
        )
        zeros = jax.tree.map(jnp.zeros_like, meta_params)
        learner = zeros.learner._replace(params=by_init)
        return zeros._replace(learner=learner), carry, metrics

    carried: dict[str, Any] = {}
    if carries_rule:
        carried = {
            "init_carry": lambda key, meta_params, episode: meta_params.rule,
            "absorb": lambda meta_params, rule: meta_params._replace(rule=rule),
        }
    return make_algorithm(
        init=tested.init,
        predict=tested.predict,
        adapt=tested.adapt,
        meta_gradient=meta_gradient,
        train_sampler=train_sampler,
        query_norm=tested.query_norm,
        **carried,
    )


def _check(adaptation: Adaptation, train_way: int | None) -> None:
    check_choice("support_stats", adaptation.support_stats, ("final", "moving"))
    gradient_scale = adaptation.gradient_scale
    if isinstance(gradient_scale, str) and gradient_scale not in ("1/batch", "way"):
        raise ValueError(
            f"gradient_scale={gradient_scale!r}: choose a number, '1/batch', 'way' or "
            "'calibrated'"
        )
    if train_way is not None and adaptation.learner.at_way is None:
        raise ValueError(
            f"train_way={train_way} needs a learner whose head fits any number of "
            "classes: wrap it in metalstm.nn.tied_head"
        )
    differentiation = adaptation.differentiation
    if not isinstance(differentiation, Differentiation):
        raise ValueError(
            f"differentiation={differentiation!r}: choose metalstm.first_order() or "
            "metalstm.second_order()"
        )
    if differentiation.truncate_every is not None:
        raise ValueError(
            f"truncate_every={differentiation.truncate_every}: the objective is the "
            "query loss after the last update, which would not depend on theta_0; "
            "omit it, or choose second_order(last=..)"
        )


def _init(
    adaptation: Adaptation,
    key: Array,
    episode: Episode,
    *,
    calibrated_by: int | None,
    way: int | None,
    trainable: bool,
) -> MetaParams:
    learner_key, rule_key = jax.random.split(key)
    state = adaptation.learner.init(learner_key, first_example(episode.support.x))
    _check_other(state.other)
    if trainable and adaptation.differentiation.order == "second":
        check_differentiable(adaptation.rule, state.params)
    rule_params = adaptation.rule.init(rule_key, state.params)
    if calibrated_by is not None:
        scale = step_scale(adaptation.learner, learner_key, episode, way, calibrated_by)
        rule_params = (jnp.log(scale), *rule_params[1:])
    if not adaptation.learn_init:
        # only the averages of `frozen` are kept of a learner drawn per episode
        state = LearnerState((), state.stats, ())
    return MetaParams(state, rule_params)


def _query_loss(
    adaptation: Adaptation,
    meta_params: MetaParams,
    key: Array,
    episode: Episode,
    *,
    num_steps: int,
    norm: QueryNorm,
    way: int | None,
) -> tuple[Array, Aux]:
    support, query = episode
    meta_params = meta_params._replace(learner=stop_statistics(meta_params.learner))
    adapted = adapt_to(
        adaptation, meta_params, key, support, num_steps=num_steps, norm=norm, way=way
    )
    outputs = query_outputs(adaptation, meta_params, adapted, support, query.x, norm)
    metrics = {
        "accuracy": accuracy(outputs, query.y, mask_of(query)),
        **support_metrics(adapted.trace, adaptation.batch_size),
    }
    gathered = {}
    if adaptation.gathers:
        _, after = adaptation.learner.apply(adapted.learner, query.x, norm="gather")
        gathered = lax.stop_gradient(after.stats)
    return task_loss(outputs, query.y, mask_of(query)), Aux(metrics, gathered)


def _adapt(
    adaptation: Adaptation,
    meta_params: MetaParams,
    key: Array,
    support: Batch,
    *,
    num_steps: int,
    norm: QueryNorm,
    num_classes: int | None = None,
) -> tuple[InnerState, Trace]:
    adapted = adapt_to(
        adaptation,
        meta_params,
        key,
        support,
        num_steps=num_steps,
        norm=norm,
        way=num_classes,
        observe=lambda inner: find_gates(inner.rule_state),
    )
    return adapted.inner, adapted.trace


def _predict(
    adaptation: Adaptation,
    meta_params: MetaParams,
    key: Array,
    support: Batch,
    query_x: Array,
    *,
    num_steps: int,
    norm: QueryNorm,
    num_classes: int | None = None,
) -> Array:
    adapted = adapt_to(
        adaptation,
        meta_params,
        key,
        support,
        num_steps=num_steps,
        norm=norm,
        way=num_classes,
    )
    outputs = query_outputs(adaptation, meta_params, adapted, support, query_x, norm)
    if num_classes is not None and outputs.shape[-1] != num_classes:
        raise ValueError(
            f"the task has {num_classes} classes but the learner's head has "
            f"{outputs.shape[-1]} outputs: choose way={outputs.shape[-1]}, or a "
            "learner wrapped in metalstm.nn.tied_head"
        )
    return outputs


def _check_other(other: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(other)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"the learner carries {jax.tree_util.keystr(path)} of type "
                f"{leaf.dtype} next to its parameters, which cannot be part of "
                "meta-parameters that are differentiated: make it a float, or compute "
                "it in the call"
            )
