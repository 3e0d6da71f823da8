"""Meta-train a method on sinusoids for one pair of rates, and measure every update."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metalstm
from experiments.studies.regression.methods import Method, make_learner
from experiments.studies.sinusoids import Config
from metalstm.base import (
    Array,
    Episode,
    Learner,
    LearnerState,
    MetaParams,
    PyTree,
    UpdateRule,
)
from metalstm.data import SinusoidSpec, episode_key
from metalstm.inner import first_order, unroll
from metalstm.meta.step import TrainState

_TRAIN_SEED = 7_919  # apart from the seeds of initialisations, which start at --seed
_CALL = 100  # meta-steps in one compiled call


def train_spec(config: Config) -> SinusoidSpec:
    return SinusoidSpec(config.shot, queries=config.shot)


class Trainer:
    """The one program of a method, for any rates, initialisation and length."""

    def __init__(self, method: Method, config: Config):
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

        self._advance = advance

        def start(inner, seed) -> TrainState:
            # the schedule has no state but its step count, whatever the rate
            optimizer = method.optimizer(lambda step: 0.0 * step)
            episode = spec.sample(jax.random.key(0))
            return metalstm.init_train_state(
                method.build(inner), optimizer, seed, episode
            )

        self._start = jax.jit(start)

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


def trajectory(
    learner: Learner, tx: Any, theta: LearnerState, episode: Episode, num_steps: int
) -> PyTree:
    """theta_0 .. theta_T of SGD (or ``tx``) on the support set: leading [T + 1]."""
    support = episode.support

    def loss_fn(params, stats, batch, key):
        del batch, key
        outputs, _ = learner.apply(
            theta._replace(params=params), support.x, norm="batch"
        )
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


class Measured(NamedTuple):
    """Of one task; numpy arrays with a leading [tasks] where `make_measure` is done."""

    errors: Any  # [T + 1] mean squared error on the query set after each update
    functions: Any  # [T + 1, grid] the network on `grid_of`


def grid_of(spec: SinusoidSpec) -> Array:
    return jnp.linspace(*spec.domain, 101)[:, None]


@functools.lru_cache
def make_measure(
    rule: Callable[[Any], UpdateRule], config: Config, shot: int
) -> Callable[[MetaParams, float, str, int], Measured]:
    """Compile once: ``(meta-parameters, inner rate, split, tasks) -> Measured``.

    Leading [tasks]; task i is a function of (seed, split, i), the same for all methods.
    Methods with the same ``rule`` (of an inner rate) share the program.
    """
    learner, spec = make_learner(config), SinusoidSpec(shot)
    grid = grid_of(spec)

    def one(params: MetaParams, rate, key) -> Measured:
        episode = spec.sample(key)
        tx = rule(rate).bind(params.rule)
        path = trajectory(learner, tx, params.learner, episode, config.test_steps)

        def outputs(theta):
            state = params.learner._replace(params=theta)
            both = jnp.concatenate([episode.query.x, grid])
            return learner.apply(state, both, norm="batch")[0]

        found = jax.vmap(outputs)(path)
        query, drawn = jnp.split(found, [spec.queries], axis=1)
        errors = jnp.square(query - episode.query.y).mean((1, 2))
        return Measured(errors, drawn[..., 0])

    @jax.jit
    def many(params, rate, keys):
        return jax.vmap(lambda key: one(params, rate, key))(keys)

    def run(params, rate, split, num_tasks) -> Measured:
        tasks = jnp.arange(num_tasks)
        keys = jax.vmap(lambda i: episode_key(config.seed, split, 0, i))(tasks)
        return jax.tree.map(np.asarray, many(params, jnp.float32(rate), keys))

    return run


class Found(NamedTuple):
    """What a method's study found; written to METHOD.npz."""

    trials: np.ndarray  # [trials, 3] inner rate, outer rate, validation error
    rates: np.ndarray  # [2] the best inner and outer rate
    losses: np.ndarray  # [inits, calls] meta-training loss
    errors: dict[int, np.ndarray]  # per shot [inits, tasks, T + 1]
    functions: np.ndarray  # [tasks drawn, T + 1, grid] of the first initialisation
    meta_parameters: int
    cpu_seconds: float


def study_method(method: Method, config: Config, say: Callable[[str], None]) -> Found:
    """Choose rates on validation tasks, meta-train from every initialisation, test."""
    started = time.process_time()
    trainer = Trainer(method, config)
    measure = {s: make_measure(method.rule, config, s) for s in config.test_shots}
    validate = make_measure(method.rule, config, config.shot)
    trials = []
    for rates in method.trials:
        # an initialisation that no final run has
        params, _ = trainer.train(
            rates, config.seed + config.inits, method.tuning_steps
        )
        errors = validate(
            params, rates[0], "validation", config.validation_tasks
        ).errors
        score = float(errors[:, 1:].mean())
        trials.append((*rates, score if np.isfinite(score) else np.inf))
    best = min(trials, key=lambda trial: trial[2])
    rates = best[:2]
    say(f"rates {rates[0]:.3g} inside, {rates[1]:.3g} outside ({best[2]:.3f})")
    losses = []
    found: dict[int, list[np.ndarray]] = {shot: [] for shot in config.test_shots}
    functions = None
    for init in range(config.inits):
        params, history = trainer.train(rates, config.seed + init, config.meta_steps)
        losses.append(history)
        for shot, run in measure.items():
            result = run(params, rates[0], "test", config.test_tasks)
            found[shot].append(result.errors)
            if functions is None:
                functions = result.functions[:_DRAWN]
        first = found[config.test_shots[0]][-1].mean(0)
        say(
            f"initialisation {init}: error {first[0]:.3f} before, {first[1]:.3f} after "
            f"1, {first[-1]:.3f} after {config.test_steps} updates"
        )
    return Found(
        np.array(trials),
        np.array(rates),
        np.array(losses),
        {shot: np.stack(errors) for shot, errors in found.items()},
        np.asarray(functions),
        sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params)),
        time.process_time() - started,
    )


_DRAWN = 40  # tasks whose functions are kept, of which a few are drawn
