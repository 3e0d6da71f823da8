"""Adapt by gradients: one engine, and the published algorithms as ways to fill it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metalstm.algorithms.common import (
    accuracy,
    check_differentiable,
    task_loss,
    with_running_statistics,
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
    Norm,
    PyTree,
    QueryNorm,
    TaskMapping,
    UpdateRule,
    make_algorithm,
)
from metalstm.inner.loop import InnerState, Memory, Trace, unroll
from metalstm.rules import find_gates, learned_sgd, lstm_gates, only

__all__ = [
    "anil",
    "fixed_sgd",
    "fomaml",
    "from_scratch",
    "learned_init",
    "maml",
    "meta_lstm",
    "meta_sgd",
]


def learned_init(
    learner: Learner,
    rule: UpdateRule,
    *,
    num_steps: int,
    second_order: bool,
    query_norm: QueryNorm = "support",
    train_query_norm: QueryNorm = "transductive",
    support_stats: Literal["final", "moving"] = "final",
    num_test_steps: int | None = None,
    learn_init: bool = True,
    batch_size: int | None = None,
    gradient_scale: float | Literal["1/batch", "way"] = 1.0,
    train_way: int | None = None,
    train_queries: int | None = None,
    trainable: bool = True,
    memory: Memory | None = None,
    scan_unroll: int = 1,
    task_mapping: TaskMapping | None = None,
) -> MetaAlgorithm:
    """Adapt ``learner`` to the support set by ``num_steps`` updates of ``rule``.

    Meta-learned: theta_0 (unless ``learn_init=False``) and the rule's parameters.
    Objective: the query loss at theta_T.

    Args:
      learner: a flax module made pure by `metalstm.nn.from_flax`.
      rule: any `UpdateRule`; an optax transform by `metalstm.rules.from_optax`.
      num_steps: T, updates on the support set.
      second_order: see `metalstm.inner.unroll`.
      query_norm: which statistics normalise a query at meta-test; `base.QueryNorm`.
      train_query_norm: likewise in meta-training. Published: the query batch's own.
      support_stats: how ``support`` gathers: ``"final"``, one more pass over the
        support set at theta_T; ``"moving"``, the module's moving average over the T
        passes at theta_0 .. theta_{T-1} (Ravi & Larochelle).
      num_test_steps: T at meta-test, when it differs.
      learn_init: False draws theta_0 afresh for every episode, so that the rule's
        parameters fit learners of any size.
      batch_size: images of the support set in one update, in a new random order each
        epoch. None: all of them.
      gradient_scale: what the gradient is multiplied by before the rule sees it;
        ``"1/batch"``: by 1 / images in the update, on top of the mean loss (the
        authors' code); ``"way"``: by the number of classes, so that a class moves its
        part of the head as far in a task of many classes as in one of few.
      train_way: meta-train on tasks with this many classes; needs a learner with
        ``at_way``, that is, a head whose classes share their start.
      train_queries: queries a class in meta-training, when they differ from the test's.
      trainable: False for a floor that is never meta-trained.
      memory: see `metalstm.inner.Memory`. None: "mixed" in second order, which was the
        fastest too (docs/memory.md), else "plain".
      scan_unroll: see `metalstm.inner.unroll`.
      task_mapping: see `metalstm.base.map_tasks`.

    Raises:
      ValueError: at construction for an argument outside its choices, or a rule that
        cannot be differentiated at a zero gradient in second order (stock Adam);
        from ``predict`` when the task's way is not the head's.
    """
    for name, value in (
        ("query_norm", query_norm),
        ("train_query_norm", train_query_norm),
    ):
        if value not in get_args(QueryNorm):
            choices = ", ".join(get_args(QueryNorm))
            raise ValueError(f"{name}={value!r}: choose one of {choices}")
    if support_stats not in ("final", "moving"):
        raise ValueError(f"support_stats={support_stats!r}: choose final or moving")
    if train_way is not None and learner.at_way is None:
        raise ValueError(
            f"train_way={train_way} needs a learner whose head fits any number of "
            "classes: wrap it in metalstm.nn.tied_head"
        )
    if isinstance(gradient_scale, str) and gradient_scale not in ("1/batch", "way"):
        raise ValueError(
            f"gradient_scale={gradient_scale!r}: choose a number, '1/batch' or 'way'"
        )
    if second_order and trainable and not rule.smooth:
        check_differentiable(rule)
    if memory is None:
        memory = "mixed" if second_order else "plain"
    test_steps = num_steps if num_test_steps is None else num_test_steps
    frozen = query_norm == "frozen" or train_query_norm == "frozen"

    def init(key: Array, episode: Episode) -> MetaParams:
        learner_key, rule_key = jax.random.split(key)
        state = learner.init(learner_key, episode.support.x[:1])
        _check_other(state.other)
        rule_params = rule.init(rule_key, state.params)
        if not learn_init:
            # only the averages of `frozen` are kept of a learner drawn per episode
            state = LearnerState((), state.stats, ())
        return MetaParams(state, rule_params)

    def start(meta_params: MetaParams, key: Array, x: Array, way: int | None):
        state = meta_params.learner
        if not learn_init:
            state = learner.init(jax.random.fold_in(key, _INIT), x[:1])
        if learner.at_way is not None:
            if way is None:
                raise ValueError(
                    "the learner's head fits any number of classes, so it must be told "
                    "how many: train_way= to meta-train, num_classes= to adapt and "
                    "predict"
                )
            state = state._replace(params=learner.at_way(state.params, way))
        return state

    def run(
        meta_params: MetaParams,
        key: Array,
        support: Batch,
        *,
        steps: int,
        norm: Literal["batch", "stored"],
        way: int | None,
        observe: Callable | None = None,
    ) -> tuple[InnerState, Trace, LearnerState]:
        state = start(meta_params, key, support.x, way)
        stats = meta_params.learner.stats if norm == "stored" else state.stats
        batches = _minibatches(key, support, batch_size, steps)

        def loss_fn(params, stats, batch, step_key):
            batch = support if batch is None else batch
            outputs, new = learner.apply(
                LearnerState(params, stats, state.other),
                batch.x,
                norm=norm,
                key=step_key,
            )
            return task_loss(outputs, batch.y), new.stats

        tx = rule.bind(meta_params.rule)
        scale = _gradient_scale(gradient_scale, learner, state, support, batch_size)
        if scale != 1.0:
            tx = optax.with_extra_args_support(optax.chain(optax.scale(scale), tx))
        inner, trace = unroll(
            loss_fn,
            tx,
            InnerState(state.params, stats, None),
            batches,
            num_steps=steps,
            second_order=second_order,
            memory=memory,
            coordinatewise=rule.coordinatewise,
            observe=observe,
            key=jax.random.fold_in(key, _DROPOUT),
            scan_unroll=scan_unroll,
        )
        return inner, trace, state

    def query_outputs(
        meta_params: MetaParams,
        inner: InnerState,
        state: LearnerState,
        support: Batch,
        query_x: Array,
        norm: QueryNorm,
    ) -> Array:
        adapted = LearnerState(inner.params, inner.stats, state.other)
        if norm == "frozen":
            adapted = adapted._replace(stats=meta_params.learner.stats)
        if norm == "support" and support_stats == "final":
            _, adapted = learner.apply(adapted, support.x, norm="gather")
        if norm == "support+1":
            return _one_by_one(learner, adapted, support.x, query_x)
        mode: Norm = "batch" if norm == "transductive" else "stored"
        outputs, _ = learner.apply(adapted, query_x, norm=mode)
        return outputs

    def loss(meta_params: MetaParams, key: Array, episode: Episode):
        support, query = episode
        # averages are gathered, never learned: a gradient step could make a variance
        # negative
        state = meta_params.learner
        stats, other = lax.stop_gradient((state.stats, state.other))
        meta_params = meta_params._replace(
            learner=state._replace(stats=stats, other=other)
        )
        norm: Literal["batch", "stored"] = (
            "stored" if train_query_norm == "frozen" else "batch"
        )
        inner, trace, state = run(
            meta_params, key, support, steps=num_steps, norm=norm, way=train_way
        )
        outputs = query_outputs(
            meta_params, inner, state, support, query.x, train_query_norm
        )
        metrics = {
            "accuracy": accuracy(outputs, query.y),
            "support_loss": trace.losses[0],
        }
        gathered = {}
        if frozen:
            adapted = LearnerState(inner.params, inner.stats, state.other)
            _, after = learner.apply(adapted, query.x, norm="gather")
            gathered = lax.stop_gradient(after.stats)
        return task_loss(outputs, query.y), Aux(metrics, gathered)

    test_norm: Literal["batch", "stored"] = (
        "stored" if query_norm == "frozen" else "batch"
    )

    def adapt(meta_params, key, support, *, num_classes: int | None = None):
        inner, trace, _ = run(
            meta_params,
            key,
            support,
            steps=test_steps,
            norm=test_norm,
            way=num_classes,
            observe=lambda inner: find_gates(inner.rule_state),
        )
        return inner, trace

    def predict(meta_params, key, support, query_x, *, num_classes: int | None = None):
        inner, _, state = run(
            meta_params,
            key,
            support,
            steps=test_steps,
            norm=test_norm,
            way=num_classes,
        )
        outputs = query_outputs(meta_params, inner, state, support, query_x, query_norm)
        if num_classes is not None and outputs.shape[-1] != num_classes:
            raise ValueError(
                f"the task has {num_classes} classes but the learner's head has "
                f"{outputs.shape[-1]} outputs: choose way={outputs.shape[-1]}, or a "
                "learner wrapped in metalstm.nn.tied_head"
            )
        return outputs

    def train_sampler(spec):
        changes = {"way": train_way, "queries": train_queries}
        changes = {name: n for name, n in changes.items() if n is not None}
        return dataclasses.replace(spec, **changes) if changes else spec

    slots: dict[str, Any] = {}
    if frozen:
        slots = with_running_statistics(
            loss,
            read=lambda p: p.learner.stats,
            write=lambda p, stats: p._replace(learner=p.learner._replace(stats=stats)),
            task_mapping=task_mapping,
        )
    return make_algorithm(
        init=init,
        loss=loss,
        predict=predict,
        adapt=adapt,
        train_sampler=train_sampler,
        query_norm=query_norm,
        trainable=trainable,
        task_mapping=task_mapping,
        **slots,
    )


# constants folded into an episode's key, one for each use of randomness
_INIT, _DROPOUT, _ORDER = 0, 1, 2


def _check_other(other: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(other)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"the learner carries {jax.tree_util.keystr(path)} of type "
                f"{leaf.dtype} beside its parameters, which cannot be part of "
                "meta-parameters that are differentiated: make it a float, or compute "
                "it in the call"
            )


def _gradient_scale(
    scale: float | str,
    learner: Learner,
    state: LearnerState,
    support: Batch,
    batch_size: int | None,
) -> float:
    if scale == "1/batch":
        return 1 / (support.x.shape[0] if batch_size is None else batch_size)
    if scale == "way":
        outputs, _ = jax.eval_shape(
            lambda: learner.apply(state, support.x[:1], norm="stored")
        )
        return float(outputs.shape[-1])
    return float(scale)


def _minibatches(key: Array, support: Batch, batch_size: int | None, num_steps: int):
    """Stacked minibatches [num_steps, batch_size, ...], or None for the whole set."""
    if batch_size is None:
        return None
    num_images = support.x.shape[0]
    if not 1 <= batch_size <= num_images or num_images % batch_size:
        raise ValueError(
            f"batch_size={batch_size} does not divide the {num_images} images of the "
            "support set: choose a divisor"
        )
    num_epochs = -(-num_steps * batch_size // num_images)
    order_key = jax.random.fold_in(key, _ORDER)
    orders = [
        jax.random.permutation(jax.random.fold_in(order_key, epoch), num_images)
        for epoch in range(num_epochs)
    ]
    rows = jnp.concatenate(orders)[: num_steps * batch_size]
    rows = rows.reshape(num_steps, batch_size)
    return jax.tree.map(lambda leaf: leaf[rows], support)


def _one_by_one(learner: Learner, state: LearnerState, support_x, query_x) -> Array:
    """Each query normalised together with the support set alone (`support+1`)."""

    def one(x):
        outputs, _ = learner.apply(
            state, jnp.concatenate([support_x, x[None]]), norm="batch"
        )
        return outputs[-1]

    return lax.map(one, query_x)


def meta_lstm(
    learner: Learner, rule: UpdateRule | None = None, *, num_steps: int, **options
) -> MetaAlgorithm:
    """Meta-Learner LSTM (Ravi & Larochelle, 2017), by default as the authors' code.

    `learned_init` with `rules.lstm_gates`, first order, the gradient divided by the
    batch size, and test statistics gathered as a moving average over the support
    passes. ``options`` are those of `learned_init`.
    """
    rule = lstm_gates() if rule is None else rule
    published: dict[str, Any] = {
        "second_order": False,
        "gradient_scale": "1/batch",
        "support_stats": "moving",
    }
    return learned_init(learner, rule, num_steps=num_steps, **(published | options))


def maml(
    learner: Learner, rate: float = 0.01, *, num_steps: int = 5, **options
) -> MetaAlgorithm:
    """MAML (Finn et al., 2017): SGD of a fixed rate, theta_0 learned, second order.

    ``options`` are those of `learned_init`.
    """
    options = {"second_order": True} | options
    rule = fixed_sgd(rate)
    return learned_init(learner, rule, num_steps=num_steps, **options)


def fomaml(learner: Learner, rate: float = 0.01, *, num_steps: int = 5, **options):
    """First-order MAML: the meta-gradient is the query gradient at theta_T."""
    return maml(
        learner, rate, num_steps=num_steps, **({"second_order": False} | options)
    )


def anil(
    learner: Learner,
    rate: float = 0.01,
    *,
    num_steps: int = 5,
    head: str = "head",
    **options,
) -> MetaAlgorithm:
    """ANIL (Raghu et al., 2020): MAML whose inner loop adapts the head alone.

    ``head`` is the name in the path of the parameters that adapt; the others are
    learned by the meta-gradient. ``options`` are those of `learned_init`.
    """
    options = {"second_order": True} | options
    rule = only(fixed_sgd(rate), head)
    return learned_init(learner, rule, num_steps=num_steps, **options)


def meta_sgd(
    learner: Learner,
    rate: tuple[float, float] = (0.005, 0.1),
    *,
    num_steps: int = 1,
    **options,
) -> MetaAlgorithm:
    """Meta-SGD (Li et al., 2017): theta_0 and a rate for every parameter, learned."""
    options = {"second_order": True} | options
    rule = learned_sgd(rate, per="parameter")
    return learned_init(learner, rule, num_steps=num_steps, **options)


def fixed_sgd(rate: float) -> UpdateRule:
    """SGD with nothing to learn."""
    rule = learned_sgd()
    return UpdateRule(
        lambda key, params: (),
        lambda _: rule.bind(rate),
        coordinatewise=True,
        smooth=True,
    )


def from_scratch(
    learner: Learner,
    rule: UpdateRule,
    *,
    num_steps: int = 100,
    query_norm: QueryNorm = "support",
    **options,
) -> MetaAlgorithm:
    """A floor: train a freshly drawn learner on the support set alone."""
    return learned_init(
        learner,
        rule,
        num_steps=num_steps,
        second_order=False,
        learn_init=False,
        trainable=False,
        query_norm=query_norm,
        **options,
    )
