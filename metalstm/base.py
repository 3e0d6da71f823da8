"""The types that everything else is made of: NamedTuples of pure functions.

Shapes: T tasks in a meta-batch, N examples, way classes, shot examples a class, d
target dimensions. Every function below is written for ONE task; the caller vmaps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import optax

from metalstm.batches import check_adapt, check_predict
from metalstm.tasks import TaskMapping, mean_over_tasks

__all__ = [
    "Absorb",
    "Adapt",
    "ApplyLearner",
    "Array",
    "Aux",
    "Batch",
    "BindRule",
    "Episode",
    "InitAlgorithm",
    "InitCarry",
    "InitLearner",
    "InitRule",
    "Learner",
    "LearnerState",
    "MetaAlgorithm",
    "MetaGradient",
    "MetaParams",
    "Norm",
    "Predict",
    "PyTree",
    "QueryNorm",
    "RuleTraits",
    "TaskLoss",
    "TrainSampler",
    "UpdateRule",
    "make_algorithm",
]

Array = jax.Array
PyTree = Any

Norm = Literal["batch", "gather", "stored"]
"""What one learner pass does with batch statistics.

``batch``: normalise by this batch; the returned moving averages are updated with the
module's own momentum. ``gather``: normalise by this batch; the returned averages *are*
this batch's statistics, whatever the momentum. ``stored``: normalise by the averages
given; they come back unchanged.
"""

QueryNorm = Literal["support", "support+1", "transductive", "frozen"]
"""Which statistics normalise a query at meta-test; see docs/batch_norm.md.

``support``: the support set's (inductive). ``support+1``: the support set plus the one
query. ``transductive``: the query batch's own. ``frozen``: averages gathered over
meta-training.
"""


class Batch(NamedTuple):
    x: PyTree  # [N, ...], or a pytree of such arrays (token ids and a mask)
    y: Array  # [N] int32 labels in [0, way), or [N, d] float targets


class Episode(NamedTuple):
    """One task. A meta-batch has a leading [T] on every leaf."""

    support: Batch  # N = way * shot
    query: Batch  # N = way * queries


class LearnerState(NamedTuple):
    params: PyTree  # what an inner loop may change
    stats: PyTree  # batch statistics (moving averages), {} when there are none
    other: PyTree  # anything else the module carries, {} when there is none


class InitLearner(Protocol):
    def __call__(self, key: Array, x: Array, /) -> LearnerState:
        """Draw a fresh learner for inputs of the shape of ``x`` [N, ...]."""


class ApplyLearner(Protocol):
    def __call__(
        self, state: LearnerState, x: Array, /, *, norm: Norm, key: Array | None = None
    ) -> tuple[Array, LearnerState]:
        """Run the network once.

        Args:
          state: parameters, batch statistics, and what else the module carries.
          x: [N, ...].
          norm: what to do with batch statistics: `Norm`.
          key: a PRNG key; dropout is active only when it is given.

        Returns:
          Outputs [N, way] (or [N, d]), and the state after the pass, in which only
          ``stats`` and ``other`` may differ.
        """


class Learner(NamedTuple):
    """A network as two pure functions; `metalstm.from_flax` makes one of a flax module.

    >>> def init(key, x):
    ...     return LearnerState({"w": jnp.zeros((x.shape[-1], 5))}, {}, {})
    >>> def apply(state, x, *, norm, key=None):
    ...     return x @ state.params["w"], state
    >>> linear = Learner(init, apply)
    """

    init: InitLearner  # (key, x [N, ...]) -> LearnerState
    apply: ApplyLearner  # (state, x [N, ...], *, norm, key) -> outputs, state
    at_way: Callable[[PyTree, int], PyTree] | None = None
    """(learned params, way) -> params with a head of that many classes, for a head
    whose classes share their start. None: the head has a fixed number of outputs."""


class InitRule(Protocol):
    def __call__(self, key: Array, params: PyTree, /) -> PyTree:
        """Draw the rule's parameters.

        Args:
          key: a PRNG key.
          params: parameters of a learner that the rule will update. A rule that fits
            learners of any size reads nothing of them.

        Returns:
          Any pytree of float arrays, the same structure for the same ``params``; ``()``
          when there is nothing to learn.
        """


class BindRule(Protocol):
    def __call__(self, rule_params: PyTree, /) -> optax.GradientTransformationExtraArgs:
        """Turn the rule's parameters into an optax transform.

        Everything that is learned comes in through ``rule_params``: the inner loop
        binds a rule several times, also to parts of them that are constants.

        Returns:
          A transform whose ``init(params)`` is a state of arrays of fixed shape, and
          whose ``update(grads, state, params, *, value, **extra)`` returns ``(delta,
          state)`` with ``delta`` to be *added* to the parameters. ``value`` is the loss
          before the update. Further keywords are ignored.

        Raises:
          ValueError: from ``update``, when ``params`` or ``value`` is needed and is not
            given.
        """


class RuleTraits(NamedTuple):
    """Promises by the author of a rule. All are safe to leave at their defaults."""

    coordinatewise: bool = False
    """Each coordinate's update reads only its own gradient, parameter and state, and
    the loss, by the same rule parameters for every coordinate (a rate for each tensor
    is not that). The rule then sees one vector of all coordinates, in blocks: a false
    promise changes values, not only derivatives."""
    smooth: bool = False
    """Its derivative is finite at a zero gradient too. Without the promise it is
    checked before anything differentiates through the rule."""
    reads_loss: bool = True
    """False: ``value=`` changes nothing. A coordinate-wise rule that promises it may
    run many tasks as one, which share no loss."""


class UpdateRule(NamedTuple):
    """A function from meta-parameters to an optax transform.

    SGD with a learned rate, theta_t = theta_{t-1} - alpha g_t, is

    >>> def init(key, params):
    ...     return jnp.float32(0.1)  # alpha
    >>> def bind(alpha):
    ...     def update(grads, state, params=None, **extra):
    ...         return jax.tree.map(lambda g: -alpha * g, grads), state
    ...     return optax.GradientTransformationExtraArgs(lambda params: (), update)
    >>> promises = RuleTraits(coordinatewise=True, smooth=True, reads_loss=False)
    >>> rule = UpdateRule(init, bind, promises)
    >>> tx = rule.bind(0.5)
    >>> tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0]
    Array([-0.5, -0.5], dtype=float32)

    An optax transform is accepted wherever a rule is (`metalstm.rules.as_rule`).

    Attributes:
      init: ``(key, params) -> rule_params``, documented in `InitRule`.
      bind: ``(rule_params) -> optax transform``, documented in `BindRule`.
      traits: what its author promises: `RuleTraits`.
    """

    init: InitRule
    bind: BindRule
    traits: RuleTraits = RuleTraits()


class MetaParams(NamedTuple):
    """What gradient-based algorithms meta-learn. Others may use any pytree."""

    learner: LearnerState  # theta_0, and the averages that `frozen` uses
    rule: PyTree  # the rule's parameters, () if none


class Aux(NamedTuple):
    """What a task's loss says besides its value; nothing here has a derivative."""

    metrics: dict[str, Array]  # scalars, averaged over the tasks of a meta-step
    gathered: PyTree = ()  # this task's batch statistics, () when none are gathered


class InitAlgorithm(Protocol):
    def __call__(self, key: Array, episode: Any, /) -> PyTree:
        """Draw the meta-parameters for tasks like ``episode``, which is ONE task.

        They are float arrays, all of which are differentiated.
        """


class TaskLoss(Protocol):
    def __call__(
        self, meta_params: PyTree, key: Array, episode: Any, /
    ) -> tuple[Array, Aux]:
        """Return one task's meta-training loss.

        Args:
          meta_params: what ``init`` drew.
          key: a PRNG key of this task and meta-step alone.
          episode: ONE task, as ``train_sampler``'s spec samples it.

        Returns:
          A scalar, whose mean over tasks is minimised, and an `Aux`.
        """


class Predict(Protocol):
    def __call__(
        self,
        meta_params: PyTree,
        key: Array,
        support: Batch,
        query_x: Array,
        /,
        *,
        num_classes: Any,
    ) -> Array:
        """Adapt to one support set, and predict its queries.

        Args:
          meta_params: after meta-training.
          key: a PRNG key, for methods that draw something.
          support: N examples.
          query_x: [M, ...].
          num_classes: the task's way, an int; None for regression.

        Returns:
          Scores [M, way], higher is better, or values [M, d].

        Raises:
          ValueError: the method does not fit a task of this many classes.
        """


class Adapt(Protocol):
    def __call__(
        self,
        meta_params: PyTree,
        key: Array,
        support: Batch,
        /,
        *,
        num_classes: Any,
    ) -> tuple[Any, Any]:
        """Adapt as `Predict` does; return `inner.InnerState` and `inner.Trace`."""


class InitCarry(Protocol):
    def __call__(self, key: Array, meta_params: PyTree, episode: Any, /) -> PyTree:
        """Start what goes from meta-step to meta-step and no gradient touches."""


class MetaGradient(Protocol):
    def __call__(
        self, meta_params: PyTree, carry: PyTree, keys: Array, episodes: Any, /
    ) -> tuple[PyTree, PyTree, dict[str, Array]]:
        """Return one meta-step's gradient; all that the train step knows of a method.

        Args:
          meta_params: of the structure that ``init`` gives.
          carry: from `InitCarry`, or from the step before.
          keys: [T], a PRNG key for each task.
          episodes: T tasks, a leading [T] on every leaf. They are those of one device,
            or of one chunk of tasks: the mean over tasks is taken here, over chunks
            and devices by the caller.

        Returns:
          The gradient, the carry, and scalar metrics, one of which is ``loss``.
        """


class Absorb(Protocol):
    def __call__(self, meta_params: PyTree, carry: PyTree, /) -> PyTree:
        """Put what the carry gathered where ``predict`` reads it, after a meta-step."""


class TrainSampler(Protocol):
    def __call__(self, spec: Any, /) -> Any:
        """Turn the test-time spec into the one to meta-train on (a higher way, say)."""


class MetaAlgorithm(NamedTuple):
    """A function from a support set to a predictor, and how it is meta-trained.

    `make_algorithm` builds one and fills in what is optional. Each slot's type says
    what it takes and gives: `InitAlgorithm`, `TaskLoss`, `Predict`, `Adapt`,
    `InitCarry`, `MetaGradient`, `Absorb`, `TrainSampler`.
    """

    init: InitAlgorithm  # (key, episode) -> meta_params
    loss: TaskLoss  # (meta_params, key, episode) -> (scalar, Aux)
    predict: Predict  # (meta_params, key, support, query_x, *, num_classes) -> scores
    adapt: Adapt | None  # (meta_params, key, support) -> (InnerState, Trace)
    init_carry: InitCarry  # (key, meta_params, episode) -> carry
    meta_gradient: MetaGradient  # (meta_params, carry, keys, episodes) -> grads, ..
    absorb: Absorb  # (meta_params, carry) -> meta_params
    train_sampler: TrainSampler  # test-time spec -> training spec
    query_norm: str | None
    """Printed with every result; None when there is no batch norm."""
    trainable: bool
    """False: nothing to meta-learn, never trained."""
    per_task_carry: bool
    """True: every leaf of the carry has a leading [T], each task's own part; chunks of
    tasks and devices then get theirs. False: one carry for all tasks."""


def make_algorithm(
    *,
    init: InitAlgorithm,
    predict: Predict,
    loss: TaskLoss | None = None,
    adapt: Adapt | None = None,
    init_carry: InitCarry | None = None,
    meta_gradient: MetaGradient | None = None,
    absorb: Absorb | None = None,
    train_sampler: TrainSampler | None = None,
    query_norm: str | None = None,
    trainable: bool = True,
    per_task_carry: bool = False,
    task_mapping: TaskMapping | None = None,
) -> MetaAlgorithm:
    """Fill in a `MetaAlgorithm`'s optional slots.

    The default ``meta_gradient`` is the mean over tasks of ``grad(loss)``; the default
    carry is ``()``; the default ``train_sampler`` trains on the test-time spec.

    Args:
      task_mapping: of the default ``meta_gradient``; see `metalstm.tasks.map_tasks`.

    Raises:
      ValueError: it is trainable, and has neither ``loss`` nor ``meta_gradient``. From
        ``predict`` and ``adapt``: labels or targets that do not fit the task.
    """
    if trainable and loss is None and meta_gradient is None:
        raise ValueError("a trainable algorithm needs loss= or meta_gradient=")

    def no_loss(meta_params, key, episode):
        raise ValueError("this algorithm has no meta-training loss (trainable=False)")

    loss_fn = no_loss if loss is None else loss

    def mean_gradient(meta_params, carry, keys, episodes):
        def one(key, episode):
            def objective(meta_params):
                value, aux = loss_fn(meta_params, key, episode)
                return value, {"loss": value, **aux.metrics}

            return jax.grad(objective, has_aux=True)(meta_params)

        grads, metrics = mean_over_tasks(one, keys, episodes, how=task_mapping)
        return grads, carry, metrics

    return MetaAlgorithm(
        init=init,
        loss=loss_fn,
        predict=check_predict(predict),
        adapt=None if adapt is None else check_adapt(adapt),
        init_carry=init_carry or (lambda key, meta_params, episode: ()),
        meta_gradient=meta_gradient or mean_gradient,
        absorb=absorb or (lambda meta_params, carry: meta_params),
        train_sampler=train_sampler or (lambda spec: spec),
        query_norm=query_norm,
        trainable=trainable,
        per_task_carry=per_task_carry,
    )
