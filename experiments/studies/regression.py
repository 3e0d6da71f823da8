"""Meta-train on a regression task for one pair of rates, and measure every update.

The parts of `experiments.studies.sinusoids` that say nothing of its methods.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metalstm
from experiments.common.tuning import Tuned, each_point, tune
from metalstm import nn
from metalstm.base import Array, Learner, MetaAlgorithm, MetaParams, PyTree, UpdateRule
from metalstm.data import SinusoidSpec, episode_key
from metalstm.inner import first_order, unroll
from metalstm.meta.step import TrainState

_TRAIN_SEED = 7_919  # apart from the seeds of initialisations, which start at --seed
_CALL = 100  # meta-steps in one compiled call
_DIVERGED = 1e3  # no target is beyond 5, so an error above this is an explosion
_DRAWN = 3  # tasks whose functions are kept, to be drawn


class Method(NamedTuple):
    """One method. Rates may be traced, so that trials share one program."""

    build: Callable[[Any], MetaAlgorithm]  # inner rate -> how it is meta-trained
    rule: Callable[[Any], UpdateRule]  # inner rate -> what adapts at meta-test
    task_gradients: int  # gradient evaluations on a task in meta-training
    tuning_steps: int  # meta-steps of a trial of rates
    inner_rates: tuple[float, ...]
    outer_rates: tuple[float, ...]  # () when it is not meta-trained
    optimizer: Callable[[Any], optax.GradientTransformation]

    @property
    def grid(self) -> dict[str, tuple[float, ...]]:
        """Inner and outer rates: twelve pairs for every method."""
        return {"inner": self.inner_rates, "outer": self.outer_rates or (0.0,)}


def make_learner(config: Any) -> Learner:
    return nn.mlp(1, config.widths)


def train_spec(config: Any) -> SinusoidSpec:
    return SinusoidSpec(config.shot, queries=config.shot)


class Trainer:
    """The one program of a method, for any rates, initialisation and length."""

    def __init__(self, method: Method, config: Any):
        self.method, self.config = method, config
        self.call = min(_CALL, config.tuning_steps, config.meta_steps)
        spec = train_spec(config)

        @jax.jit
        def advance(state: TrainState, inner, outer, length):
            """Outer rate: linearly to 0 over ``length`` meta-steps."""
            optimizer = method.optimizer(
                lambda step: outer * jnp.maximum(0.0, 1 - step / length)
            )
            loop = metalstm.make_train_loop(
                method.build(inner),
                optimizer,
                spec,
                num_tasks=config.tasks,
                steps_per_call=self.call,
            )
            return loop(state, None)

        @jax.jit
        def start(inner, seed) -> TrainState:
            # the schedule has no state but its step count, whatever the rate
            optimizer = method.optimizer(lambda step: 0.0 * step)
            episode = spec.sample(jax.random.key(0))
            return metalstm.init_train_state(
                method.build(inner), optimizer, seed, episode
            )

        self._advance, self._start = advance, start

    def train(
        self, rates: tuple[float, float], init_seed: int, num_steps: int
    ) -> tuple[MetaParams, list[float]]:
        """Meta-parameters after ``num_steps`` (up to a whole call), and the losses.

        Only theta_0's (and the rule's) initialisation depends on ``init_seed``: tasks
        are the same for all of them. A meta-step that is not finite is not taken.
        """
        inner, outer = map(jnp.float32, rates)
        state = self._start(inner, jnp.uint32(init_seed))
        if not self.method.outer_rates:
            return state.params, []
        state = state._replace(seed=jnp.uint32(self.config.seed + _TRAIN_SEED))
        losses = []
        for _ in range(-(-num_steps // self.call)):
            state, metrics = self._advance(state, inner, outer, jnp.float32(num_steps))
            losses.append(float(metrics["loss"].mean()))
        return state.params, losses


def trajectory(learner: Learner, tx: Any, theta, support, num_steps: int) -> PyTree:
    """theta_0 .. theta_T of SGD (or ``tx``) on the support set: leading [T + 1]."""

    def loss_fn(params, stats, batch, key):
        del batch, key
        state = theta._replace(params=params)
        outputs, _ = learner.apply(state, support.x, norm="batch")
        return jnp.square(outputs - support.y).mean(), stats

    _, trace = unroll(
        loss_fn,
        tx,
        (),
        theta.params,
        num_steps=num_steps,
        differentiation=first_order(),
        stats=theta.stats,
        observe=lambda state: state.params,
    )
    return jax.tree.map(
        lambda first, later: jnp.concatenate([first[None], later]),
        theta.params,
        trace.observed,
    )


def grid_of(spec: SinusoidSpec) -> Array:
    return jnp.linspace(*spec.domain, 101)[:, None]


@functools.lru_cache
def make_measure(
    rule: Callable[[Any], UpdateRule], config: Any, shot: int
) -> Callable[[MetaParams, float, str, int], tuple[np.ndarray, np.ndarray]]:
    """Compile once: ``(meta-parameters, inner rate, split, tasks)`` -> two arrays.

    The mean squared error on the query set after each update, [tasks, T + 1], and the
    network on `grid_of`, [tasks, T + 1, grid]. Task i is a function of (seed, split,
    i), the same for all methods; those with the same ``rule`` share the program.
    """
    learner, spec = make_learner(config), SinusoidSpec(shot)
    grid = grid_of(spec)

    def one(params: MetaParams, rate, key):
        episode = spec.sample(key)
        tx = rule(rate).bind(params.rule)
        path = trajectory(
            learner, tx, params.learner, episode.support, config.test_steps
        )

        def outputs(theta):
            state = params.learner._replace(params=theta)
            both = jnp.concatenate([episode.query.x, grid])
            return learner.apply(state, both, norm="batch")[0]

        query, drawn = jnp.split(jax.vmap(outputs)(path), [spec.queries], axis=1)
        errors = jnp.square(query - episode.query.y).mean((1, 2))
        return errors, drawn[..., 0]

    @jax.jit
    def many(params, rate, keys):
        return jax.vmap(lambda key: one(params, rate, key))(keys)

    def run(params, rate, split, num_tasks):
        tasks = jnp.arange(num_tasks)
        keys = jax.vmap(lambda i: episode_key(config.seed, split, 0, i))(tasks)
        return jax.tree.map(np.asarray, many(params, jnp.float32(rate), keys))

    return run


class Found(NamedTuple):
    """What a method's study found."""

    scores: np.ndarray  # [inner rates, outer rates] validation error
    losses: np.ndarray  # [inits, calls] meta-training loss
    errors: np.ndarray  # [shots, inits, tasks, T + 1]
    functions: np.ndarray  # [tasks drawn, T + 1, grid] of the first initialisation
    meta_parameters: Any
    cpu_seconds: Any

    def tuned(self, method: Method) -> Tuned:
        return tune(lambda grid: self.scores, method.grid)


def without_explosions(found: Found) -> Found:
    """Errors that exploded as infinite, so that nobody averages them."""
    errors = np.where(found.errors < _DIVERGED, found.errors, np.inf)
    return found._replace(errors=errors)


def study_method(method: Method, config: Any, say: Callable[[str], None]) -> Found:
    """Choose rates on validation tasks, meta-train from every initialisation, test."""
    started = time.process_time()
    trainer = Trainer(method, config)
    measures = [make_measure(method.rule, config, shot) for shot in config.test_shots]
    validate = make_measure(method.rule, config, config.shot)

    def score(inner: float, outer: float) -> float:
        # an initialisation that no final run has
        seed = config.seed + config.inits
        params, _ = trainer.train((inner, outer), seed, method.tuning_steps)
        errors, _ = validate(params, inner, "validation", config.validation_tasks)
        return float(errors[:, 1:].mean())

    tuned = tune(each_point(score), method.grid)
    rates = tuned.best["inner"], tuned.best["outer"]
    say(f"rates {rates[0]:.3g} inside, {rates[1]:.3g} outside ({tuned.score:.3f})")
    losses, errors, functions = [], [], []
    for init in range(config.inits):
        params, history = trainer.train(rates, config.seed + init, config.meta_steps)
        results = [run(params, rates[0], "test", config.test_tasks) for run in measures]
        losses.append(history)
        errors.append([found for found, _ in results])
        functions.append(results[0][1][:_DRAWN])
        first = errors[-1][0].mean(0)
        say(
            f"initialisation {init}: error {first[0]:.3f} before, {first[1]:.3f} after "
            f"1, {first[-1]:.3f} after {config.test_steps} updates"
        )
    return Found(
        tuned.scores,
        np.array(losses),
        np.array(errors).swapaxes(0, 1),
        functions[0],
        sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params)),
        time.process_time() - started,
    )
