"""The types that everything else is made of: NamedTuples of pure functions.

Shapes: T tasks in a meta-batch, N examples, way classes, shot examples a class, d
target dimensions. Every function below is written for ONE task; the caller vmaps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import optax

from metalstm.records import document_slots

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

    A linear classifier of five classes is

    >>> def init(key, x):
    ...     return LearnerState({"w": jnp.zeros((x.shape[-1], 5))}, {}, {})
    >>> def apply(state, x, *, norm, key=None):
    ...     return x @ state.params["w"], state
    >>> linear = Learner(init, apply)
    >>> state = linear.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> outputs, state = linear.apply(state, jnp.ones((2, 3)), norm="batch")
    >>> outputs.shape
    (2, 5)

    Attributes:
      init: ``(key, x) -> state``. Draws a `LearnerState` for inputs like x [N, ...].
      apply: ``(state, x, *, norm, key=None) -> (outputs, state)``. Runs the network on
        x [N, ...] and returns outputs [N, way], or [N, d]; ``norm`` is ``"batch"``,
        ``"gather"`` or ``"stored"``. Without batch norm, ignore ``norm`` and return the
        state as it was.
      at_way: ``(params, way) -> params``. Gives the learned parameters a head of that
        many classes, for a head whose classes share their start. None: the head has a
        fixed number of outputs.
    """

    init: InitLearner
    apply: ApplyLearner
    at_way: Callable[[PyTree, int], PyTree] | None = None
    made_by: Any = None  # for `metalstm.save`, see `metalstm.records`


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
    """Promises by the author of a rule. All are safe to leave at their defaults.

    Attributes:
      coordinatewise: each coordinate's update reads only its own gradient, parameter
        and state, and the loss, by the same rule parameters for every coordinate (a
        rate for each tensor breaks this). The rule then sees one vector of all
        coordinates, in blocks: a false promise changes values, not only derivatives.
      smooth: its derivative is finite at a zero gradient too. Without the promise it is
        checked before anything differentiates through the rule.
      reads_loss: False: ``value=`` changes nothing. A coordinate-wise rule that
        promises it may run many tasks as one, which share no loss.
    """

    coordinatewise: bool = False
    smooth: bool = False
    reads_loss: bool = True


class UpdateRule(NamedTuple):
    """A function from meta-parameters to an optax transform.

    SGD with a learned rate, theta_t = theta_{t-1} - alpha g_t, is

    >>> def init(key, params):
    ...     return jnp.float32(0.1)  # alpha
    >>> def bind(alpha):
    ...     tx = optax.stateless_with_tree_map(lambda g, param: -alpha * g)
    ...     return optax.with_extra_args_support(tx)  # update() takes value=, too
    >>> promises = RuleTraits(coordinatewise=True, smooth=True, reads_loss=False)
    >>> rule = UpdateRule(init, bind, promises)
    >>> tx = rule.bind(0.5)
    >>> tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0]
    Array([-0.5, -0.5], dtype=float32)

    An optax transform is accepted wherever a rule is (`metalstm.rules.as_rule`).

    Attributes:
      init: ``(key, params) -> rule_params``. Draws what is meta-learned, any pytree of
        float arrays, to update a learner's ``params``; ``()`` when there is nothing.
      bind: ``(rule_params) -> optax.GradientTransformationExtraArgs``. The transform's
        ``init(params)`` gives a state of arrays of fixed shape; its ``update(grads,
        state, params, *, value, **extra)`` returns ``(delta, state)``, where ``delta``
        has the shapes of ``grads`` and is *added* to the parameters, and ``value`` is
        the loss before the update. It raises ValueError when it needs ``params`` or
        ``value`` and does not get them.
      traits: what its author promises, for speed: `RuleTraits`.
    """

    init: InitRule
    bind: BindRule
    traits: RuleTraits = RuleTraits()
    made_by: Any = None  # for `metalstm.save`, see `metalstm.records`


class MetaParams(NamedTuple):
    """What gradient-based algorithms meta-learn. Others may use any pytree."""

    learner: LearnerState  # theta_0, and the averages that `frozen` uses
    rule: PyTree  # the rule's parameters, () if none


class Aux(NamedTuple):
    """What a task's loss returns besides its value; nothing here has a derivative."""

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
        """Start the carry, which meta-steps pass on and which has no gradient."""


class MetaGradient(Protocol):
    def __call__(
        self, meta_params: PyTree, carry: PyTree, keys: Array, episodes: Any, /
    ) -> tuple[PyTree, PyTree, dict[str, Array]]:
        """Return one meta-step's gradient; the train step needs nothing else.

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
        """Turn the test-time spec into that of meta-training (a higher way, say)."""


class MetaAlgorithm(NamedTuple):
    """A function from a support set to a predictor, and how it is meta-trained.

    `metalstm.make_algorithm` fills in what is optional. A method that learns a scale
    for the distance to the mean of a class is

    >>> from metalstm.algorithms import make_algorithm, query_loss
    >>> def init(key, episode):
    ...     return jnp.float32(1)
    >>> def predict(scale, key, support, query_x, *, num_classes):
    ...     of_class = jax.nn.one_hot(support.y, num_classes)  # [N, way]
    ...     means = of_class.T @ support.x / of_class.sum(0)[:, None]  # [way, d]
    ...     return -scale * jnp.square(query_x[:, None] - means).sum(-1)  # [M, way]
    >>> nearest_mean = make_algorithm(
    ...     init=init, predict=predict, loss=query_loss(predict, 2)
    ... )
    >>> support = Batch(jnp.array([[0.0], [4.0]]), jnp.array([0, 1]))
    >>> nearest_mean.predict(0.5, None, support, jnp.array([[1.0]]), num_classes=2)
    Array([[-0.5, -4.5]], dtype=float32)

    Attributes:
      init: ``(key, episode) -> meta_params``. Draws what is meta-learned, any pytree of
        float arrays, for tasks like this one.
      loss: ``(meta_params, key, episode) -> (scalar, Aux)``. One task's loss.
      predict: ``(meta_params, key, support, query_x, *, num_classes) -> scores``.
        Adapts to the support set (x [N, ...], y [N]) and scores the queries [M, ...]:
        [M, way], higher is better; for regression values [M, d]. It raises ValueError
        for a task that the method does not fit.
      adapt: as ``predict``, returns ``(InnerState, Trace)`` of the inner loop, or None.
      init_carry: ``(key, meta_params, episode) -> carry``. Starts what goes from
        meta-step to meta-step and has no gradient.
      meta_gradient: ``(meta_params, carry, keys, episodes) -> (gradient, carry,
        metrics)``. One meta-step over T tasks: keys [T], episodes with a leading [T].
      absorb: ``(meta_params, carry) -> meta_params``. Puts what the carry gathered
        where ``predict`` reads it, after each meta-step.
      train_sampler: ``(spec) -> spec``. From the tasks of the test to those of
        meta-training.
      query_norm: printed with every result; None when there is no batch norm.
      trainable: False: there is nothing to meta-learn, and it is never trained.
      per_task_carry: True: every leaf of the carry has a leading [T], each task's own
        part, which chunks of tasks and devices split. False: one carry for all tasks.
      masked: True: rows of a `MaskedBatch` that are no examples change nothing.
    """

    init: InitAlgorithm
    loss: TaskLoss
    predict: Predict
    adapt: Adapt | None
    init_carry: InitCarry
    meta_gradient: MetaGradient
    absorb: Absorb
    train_sampler: TrainSampler
    query_norm: str | None
    trainable: bool
    per_task_carry: bool
    masked: bool = False
    made_by: Any = None  # for `metalstm.save`, see `metalstm.records`


document_slots(Learner, UpdateRule, MetaAlgorithm)
