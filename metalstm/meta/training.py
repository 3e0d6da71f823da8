"""Meta-training: one step, several steps in one jitted call, the loop around them.

The step knows only `MetaAlgorithm.meta_gradient`, so it serves every algorithm.
Episodes come from (seed, step, task): nothing but the state is needed to go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from metalstm.base import Array, Episode, MetaAlgorithm, PyTree
from metalstm.data.episodes import TaskSampler, episode_key
from metalstm.runtime import processes, sharding
from metalstm.runtime.compilation import Jitted

__all__ = [
    "FitState",
    "NonFiniteLossError",
    "TrainState",
    "adam_clipped",
    "fit",
    "init_fit_state",
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


class NonFiniteLossError(FloatingPointError):
    """The meta-loss or its gradient became NaN or infinite; ``.step`` says when."""

    def __init__(self, step: int, loss: float):
        super().__init__(
            f"the meta-loss or its gradient is not finite at step {step} (loss "
            f"{loss}); the state before that step is kept: lower the "
            "learning rate or the inner step size, or clip gradients more tightly"
        )
        self.step = step


def adam_clipped(
    learning_rate: optax.ScalarOrSchedule = 1e-3, max_norm: float = 0.25
) -> optax.GradientTransformation:
    """Adam behind global-norm clipping (Ravi & Larochelle: 1e-3 and 0.25)."""
    return optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(learning_rate))


def init_train_state(
    algorithm: MetaAlgorithm,
    optimizer: optax.GradientTransformation,
    seed: int | Array,
    episode: PyTree,
) -> TrainState:
    """Draw meta-parameters for episodes shaped like ``episode`` (ONE task).

    It is whatever the sampler returns: an `Episode`, a `learned_optimizers.Draw`.
    """
    seed = jnp.asarray(seed, jnp.uint32)
    key = jax.random.fold_in(jax.random.key(seed), _INIT)
    params = algorithm.init(key, episode)
    carry = algorithm.init_carry(jax.random.fold_in(key, 1), params, episode)
    state = TrainState(jnp.int32(0), seed, params, optimizer.init(params), carry)
    # copies: a train step donates its state, which may hold no buffer twice
    return jax.tree.map(jnp.array, state)


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
    if num_tasks < 1 or steps_per_call < 1:
        raise ValueError(
            f"num_tasks={num_tasks}, steps_per_call={steps_per_call}: choose at least 1"
        )
    train_spec = algorithm.train_sampler(spec)

    def sample(keys: Array, pool: Any) -> Any:
        return jax.vmap(lambda key: train_spec.sample(key, pool))(keys)

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
    if accumulate is not None:
        meta_gradient = _in_chunks(meta_gradient, accumulate, algorithm.per_task_carry)

    def gradient(params, carry, keys, tasks, pool):
        episodes = tasks if sample is None else sample(tasks, pool)
        return meta_gradient(params, carry, keys, episodes)

    if mesh is not None:
        gradient = _over_mesh(gradient, mesh, algorithm.per_task_carry)

    def step_fn(state: TrainState, tasks: PyTree, pool: Any):
        num_tasks = jax.tree.leaves(tasks)[0].shape[0]
        key = jax.random.fold_in(jax.random.key(state.seed), _TASK)
        key = jax.random.fold_in(key, state.step)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_tasks))
        grads, carry, metrics = gradient(state.params, state.carry, keys, tasks, pool)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = algorithm.absorb(optax.apply_updates(state.params, updates), carry)
        new = TrainState(state.step + 1, state.seed, params, opt_state, carry)
        grad_norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return new, metrics | {"grad_norm": grad_norm, "finite": finite}

    return step_fn


def _in_chunks(meta_gradient: Callable, chunk: int, per_task_carry: bool) -> Callable:
    """The mean over chunks of tasks, one chunk after another."""
    if chunk < 1:
        raise ValueError(f"accumulate_tasks={chunk}: choose at least 1")

    def chunked(params, carry, keys, episodes):
        num_tasks = keys.shape[0]
        if num_tasks % chunk:
            raise ValueError(
                f"accumulate_tasks={chunk} does not divide the {num_tasks} tasks of a "
                "meta-step (on one device)"
            )
        fold = lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:])  # noqa: E731
        shared, own = ((), carry) if per_task_carry else (carry, ())
        chunks = jax.tree.map(fold, (keys, episodes, own))

        def one_chunk(shared, keys, episodes, own):
            carry = own if per_task_carry else shared
            return meta_gradient(params, carry, keys, episodes)

        def body(state, xs):
            shared, total = state
            grads, carry, metrics = one_chunk(shared, *xs)
            shared, own = ((), carry) if per_task_carry else (carry, ())
            return (shared, jax.tree.map(jnp.add, total, (grads, metrics))), own

        shapes = jax.eval_shape(
            one_chunk, shared, *jax.tree.map(lambda x: x[0], chunks)
        )
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[2])
        )
        (shared, total), own = lax.scan(body, (shared, zeros), chunks)
        grads, metrics = jax.tree.map(lambda x: x * (chunk / num_tasks), total)
        own = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), own)
        return grads, own if per_task_carry else shared, metrics

    return chunked


def _over_mesh(gradient: Callable, mesh: Mesh, per_task_carry: bool) -> Callable:
    """Each device's own tasks on each device; one mean over the ``"task"`` axis."""
    if "task" not in mesh.axis_names:
        raise ValueError(f"mesh has axes {mesh.axis_names}: one must be called 'task'")
    num_devices = mesh.shape["task"]

    def mean(x: Array) -> Array:
        # counters are the same on every device, and must stay integers
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return lax.pmean(x, mesh.axis_names) if inexact else x

    def on_one_device(params, carry, keys, tasks, pool):
        grads, carry, metrics = gradient(params, carry, keys, tasks, pool)
        if not per_task_carry:
            carry = jax.tree.map(mean, carry)
        return jax.tree.map(mean, grads), carry, jax.tree.map(mean, metrics)

    carry_spec = P("task") if per_task_carry else P()
    spread = sharding.spread(
        on_one_device,
        mesh,
        in_specs=(P(), carry_spec, P("task"), P("task"), P()),
        out_specs=(P(), carry_spec, P()),
    )

    def checked(params, carry, keys, tasks, pool):
        num_tasks = keys.shape[0]
        if num_tasks % num_devices:
            raise ValueError(
                f"the {num_tasks} tasks of a meta-step are not a multiple of the "
                f"mesh's {num_devices} devices: choose {num_devices}, "
                f"{2 * num_devices} and so on, or fewer devices"
            )
        return spread(params, carry, keys, tasks, pool)

    return checked


class FitState(NamedTuple):
    """What a checkpoint holds: where training is, and the best of it so far."""

    train: TrainState
    best_params: PyTree
    best_score: Array  # float32, -inf before the first validation
    best_step: Array  # int32


def init_fit_state(state: TrainState) -> FitState:
    """Nothing validated yet. Parameters are copied: a train step donates its own."""
    copy = jax.tree.map(jnp.array, state.params)
    return FitState(state, copy, jnp.float32(-jnp.inf), jnp.int32(0))


def fit(
    train_loop: Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]],
    state: FitState,
    pool: Any,
    *,
    num_steps: int,
    steps_per_call: int = 1,
    validate: Callable[[PyTree], float] | None = None,
    validate_every: int = 0,
    report: Callable[[int, dict[str, float]], None] | None = None,
    report_every: int = 1,
    save: Callable[[FitState], None] | None = None,
    save_every: int = 0,
    max_seconds: float | None = None,
) -> FitState:
    """Run ``train_loop`` until ``num_steps`` meta-steps are done.

    Cadences count absolute steps, so a resumed run validates and saves where the
    uninterrupted one does.

    Args:
      train_loop: from `make_train_loop`, with the same ``steps_per_call``.
      validate: meta-parameters -> score, higher is better; the best are kept.
      validate_every, report_every, save_every: in meta-steps, multiples of
        ``steps_per_call``; 0 is never (validation and saving also happen at the end).
      report: (step, mean metrics since the last report).
      save: gets the whole state.
      max_seconds: stop after this long; the end is then validated and saved as usual.
        Several processes agree on it when they report.

    Raises:
      NonFiniteLossError: names the step; the state before it has been saved.
      ValueError: a cadence is not a multiple of ``steps_per_call``, or the pool holds
        values that are NaN or infinite.
    """
    cadences = {
        "num_steps": num_steps,
        "validate_every": validate_every,
        "report_every": report_every,
        "save_every": save_every,
    }
    for name, value in cadences.items():
        if value % steps_per_call:
            raise ValueError(
                f"{name}={value} is not a multiple of steps_per_call={steps_per_call}"
            )
    _refuse_not_finite(pool)
    started = time.monotonic()
    step = int(state.train.step)
    pending: list[dict[str, Array]] = []

    def flush() -> None:
        if not pending:
            return
        means = _mean_metrics(pending, step)
        pending.clear()
        if report is not None:
            report(step, means)

    def time_is_over(step: int) -> bool:
        if max_seconds is None:
            return False
        over = time.monotonic() - started > max_seconds
        if jax.process_count() == 1:
            return over
        # clocks differ, and asking costs: at every report all do what one wants
        every = report_every or steps_per_call
        return step % every == 0 and processes.any_process(over)

    def keep(validated: bool) -> None:
        nonlocal state
        if validated and validate is not None:
            state = _validated(state, validate)
        if save is not None:
            save(state)

    try:
        while step < num_steps:
            train, metrics = train_loop(state.train, pool)
            state = state._replace(train=train)
            sharding.block_on_cpu_collectives(metrics)
            step += steps_per_call
            pending.append(metrics)
            done = step >= num_steps or time_is_over(step)
            validates = done or (bool(validate_every) and step % validate_every == 0)
            saves = done or (bool(save_every) and step % save_every == 0)
            if validates or saves or (bool(report_every) and step % report_every == 0):
                flush()
            if validates or saves:
                keep(validates)
            if done:
                break
    except NonFiniteLossError:
        keep(validated=False)
        raise
    return state


def _refuse_not_finite(pool: Any) -> None:
    """Name the data, before a loss that is NaN blames the learning rate."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(pool)[0]:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            continue
        bad = int(jnp.sum(~jnp.isfinite(leaf)))
        if bad:
            raise ValueError(
                f"pool{jax.tree_util.keystr(path)} holds {bad} values that are NaN or "
                "infinite: remove or replace them"
            )


def _validated(state: FitState, validate: Callable[[PyTree], float]) -> FitState:
    score = float(validate(state.train.params))
    if not score > float(state.best_score):
        return state
    copy = jax.tree.map(jnp.array, sharding.local(state.train.params))
    return state._replace(
        best_params=copy,
        best_score=jnp.float32(score),
        best_step=jnp.int32(int(state.train.step)),
    )


def _mean_metrics(pending: list[dict[str, Array]], step: int) -> dict[str, float]:
    """The means over pending steps; raises at the first that is not finite."""
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pending)
    host = jax.device_get(stacked)
    finite = host.pop("finite")
    if not finite.all():
        first = int(finite.argmin())
        bad = step - len(finite) + first + 1
        raise NonFiniteLossError(bad, float(host["loss"][first]))
    means = {name: float(values.mean()) for name, values in host.items()}
    return {name: value for name, value in means.items() if not math.isnan(value)}
