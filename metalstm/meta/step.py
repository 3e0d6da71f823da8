"""One meta-step, and several of them with their sampling in one jitted call.

The step knows only `MetaAlgorithm.meta_gradient`, so it serves every algorithm.
Episodes come from (seed, step, task): nothing but the state is needed to resume.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from metalstm.algorithms.common import RunningStatistics
from metalstm.base import (
    Array,
    Episode,
    LearnerState,
    MetaAlgorithm,
    MetaParams,
    PyTree,
)
from metalstm.checks import check_at_least
from metalstm.data.episodes import TaskSampler, episode_key, sample_checked
from metalstm.data.varying import check_masked
from metalstm.nn.starting import init_from
from metalstm.runtime import sharding
from metalstm.runtime.compilation import Jitted
from metalstm.tasks import in_chunks, over_mesh

__all__ = [
    "TrainState",
    "adam_clipped",
    "init_train_state",
    "make_train_loop",
    "make_train_step",
    "place_state",
]

# folded into the seed: keys of initialisation and of what happens inside a task
_INIT, _TASK = 101, 102


class TrainState(NamedTuple):
    step: Array  # int32, meta-steps done
    seed: Array  # uint32; every key derives from it and the step
    params: PyTree  # meta-parameters
    opt_state: PyTree
    carry: PyTree  # what no gradient touches


def adam_clipped(
    learning_rate: optax.ScalarOrSchedule = 1e-3, max_norm: float = 0.25
) -> optax.GradientTransformation:
    """Adam after global-norm clipping (Ravi & Larochelle: 1e-3 and 0.25)."""
    return optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(learning_rate))


def init_train_state(
    algorithm: MetaAlgorithm,
    optimizer: optax.GradientTransformation,
    seed: int | Array,
    episode: PyTree,
    *,
    start: LearnerState | MetaParams | None = None,
) -> TrainState:
    """Draw meta-parameters for episodes shaped like ``episode`` (ONE task).

    The sampler returns ``episode``, an `Episode` or a `learned_optimizers.Draw`.

    Args:
      start: what theta_0 and its batch statistics start from, by
        `metalstm.nn.init_from`: a trained learner, or the meta-parameters of a trained
        method, of which the learner is taken and the rule is not. Averages of batch
        statistics go on from its own as from a hundred meta-steps.

    Raises:
      ValueError: ``start`` does not fit, or the method has no learner to start.
      TypeError: ``start`` is neither, such as a `Predictor` in place of its ``params``.
    """
    seed = jnp.asarray(seed, jnp.uint32)
    key = jax.random.fold_in(jax.random.key(seed), _INIT)
    params = drawn = algorithm.init(key, episode)
    if start is not None:
        params = _started(params, start)
    carry_key = jax.random.fold_in(key, 1)
    carry = algorithm.init_carry(carry_key, params, episode)
    if isinstance(carry, RunningStatistics) and start is not None:
        carry = carry.going_on(algorithm.init_carry(carry_key, drawn, episode).stats)
    state = TrainState(jnp.int32(0), seed, params, optimizer.init(params), carry)
    # copies: a train step donates its state, which may hold no buffer twice
    return jax.tree.map(jnp.array, state)


def _started(params: PyTree, start: Any) -> PyTree:
    trained = start.learner if isinstance(start, MetaParams) else start
    if isinstance(params, MetaParams):
        return params._replace(learner=init_from(params.learner, trained).state)
    if isinstance(params, LearnerState):
        return init_from(params, trained).state
    raise ValueError(
        f"start is a {type(start).__name__}: this method's meta-parameters are no "
        "learner; omit it"
    )


def place_state(
    algorithm: MetaAlgorithm, state: TrainState, mesh: Mesh | None
) -> TrainState:
    """Put the state where a step over ``mesh`` has it: copied to every device.

    A carry of each task's own is split over them.
    """
    carry = sharding.place(state.carry, mesh, per_task=algorithm.per_task_carry)
    rest = sharding.place(state._replace(carry=()), mesh)
    return rest._replace(carry=carry)


def make_train_step(
    algorithm: MetaAlgorithm,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    accumulate_tasks: int | None = None,
) -> Callable[[TrainState, Episode], tuple[TrainState, dict[str, Array]]]:
    """One meta-step, jitted: ``(state, episodes [T]) -> (state, metrics)``.

    A step whose loss or gradient is not finite leaves the state as it was and reports
    ``metrics["finite"] = False``.

    Args:
      mesh: spreads the tasks over its ``"task"`` axis; T must be a multiple of it. See
        `metalstm.runtime.sharding.task_mesh`, and `place_state` for the state.
      accumulate_tasks: tasks that a device computes at once; their gradients are
        summed chunk by chunk, to save memory. None: all of its tasks.
    """
    step = _train_step(algorithm, optimizer, mesh, accumulate_tasks)

    def one(state: TrainState, episodes: Episode):
        return step(state, episodes, ())

    return Jitted(one, donate_argnums=0)


def make_train_loop(
    algorithm: MetaAlgorithm,
    optimizer: optax.GradientTransformation,
    spec: TaskSampler,
    *,
    num_tasks: int,
    steps_per_call: int = 1,
    mesh: Mesh | None = None,
    accumulate_tasks: int | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Sample and step in one jitted call: ``(state, pool) -> (state, metrics)``.

    Metrics have a leading [steps_per_call]. ``spec`` is the test-time spec; the
    algorithm's ``train_sampler`` says what to meta-train on. On an accelerator many
    steps a call hide the dispatch; another number is another program, so it belongs in
    the configuration of a run that must be repeated to the bit.

    Over a ``mesh`` each device samples its own tasks: the episodes of a step are the
    same on any number of devices, and only the gradient travels.
    """
    check_at_least("num_tasks", num_tasks, 1)
    check_at_least("steps_per_call", steps_per_call, 1)
    train_spec = algorithm.train_sampler(spec)
    check_masked(algorithm, train_spec)

    def sample(keys: Array, pool: Any) -> Any:
        with jax.named_scope("sample"):  # so that profiles and benchmarks.tpu tell it
            return jax.vmap(lambda key: sample_checked(train_spec, key, pool))(keys)

    step_fn = _train_step(algorithm, optimizer, mesh, accumulate_tasks, sample)

    def one(state: TrainState, pool):
        key = lambda task: episode_key(state.seed, "train", state.step, task)  # noqa: E731
        return step_fn(state, jax.vmap(key)(jnp.arange(num_tasks)), pool)

    def run(state: TrainState, pool):
        if steps_per_call == 1:
            state, metrics = one(state, pool)
            return state, jax.tree.map(lambda leaf: leaf[None], metrics)
        return lax.scan(lambda s, _: one(s, pool), state, length=steps_per_call)

    return Jitted(run, donate_argnums=0)


def _train_step(
    algorithm: MetaAlgorithm,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None,
    accumulate: int | None,
    sample: Callable[[PyTree, Any], PyTree] | None = None,
):
    """``(state, tasks [T], pool)``: tasks are episodes, or what to sample them from."""
    meta_gradient = algorithm.meta_gradient
    optimizer = optax.with_extra_args_support(optimizer)  # some read the loss
    if accumulate is not None:
        meta_gradient = in_chunks(meta_gradient, accumulate, algorithm.per_task_carry)

    def gradient(params, carry, keys, tasks, pool):
        episodes = tasks if sample is None else sample(tasks, pool)
        return meta_gradient(params, carry, keys, episodes)

    if mesh is not None:
        gradient = over_mesh(gradient, mesh, algorithm.per_task_carry)

    def step_fn(state: TrainState, tasks: PyTree, pool: Any):
        num_tasks = jax.tree.leaves(tasks)[0].shape[0]
        key = jax.random.fold_in(jax.random.key(state.seed), _TASK)
        key = jax.random.fold_in(key, state.step)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_tasks))
        grads, carry, metrics = gradient(state.params, state.carry, keys, tasks, pool)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, value=metrics["loss"]
        )
        params = algorithm.absorb(optax.apply_updates(state.params, updates), carry)
        new = TrainState(state.step + 1, state.seed, params, opt_state, carry)
        grad_norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return new, metrics | {"grad_norm": grad_norm, "finite": finite}

    return step_fn
