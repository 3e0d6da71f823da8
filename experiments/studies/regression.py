"""Meta-train on a regression task for one pair of rates, and measure every update.

The parts of `experiments.studies.sinusoids` that say nothing of its methods.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import metalstm
from experiments.common.tuning import Tuned, each_point, tune
from metalstm import nn, plots
from metalstm.base import Array, Learner, MetaAlgorithm, MetaParams, PyTree, UpdateRule
from metalstm.data import SinusoidSpec, episode_key
from metalstm.inner import first_order, unroll
from metalstm.meta.step import TrainState
from metalstm.runtime.files import atomic_write

_TRAIN_SEED = 7_919  # apart from the seeds of initialisations, which start at --seed
_CALL = 100  # meta-steps in one compiled call
_DIVERGED = 1e3  # no target is beyond 5, so an error above this is an explosion
_DRAWN = 3  # tasks whose functions are drawn
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


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
    """What a method's study found; written to METHOD.npz."""

    scores: np.ndarray  # [inner rates, outer rates] validation error
    losses: np.ndarray  # [inits, calls] meta-training loss
    errors: dict[int, np.ndarray]  # per shot [inits, tasks, T + 1]
    functions: np.ndarray  # [tasks drawn, T + 1, grid] of the first initialisation
    meta_parameters: int
    cpu_seconds: float

    def tuned(self, method: Method) -> Tuned:
        return tune(lambda grid: self.scores, method.grid)


def study_method(method: Method, config: Any, say: Callable[[str], None]) -> Found:
    """Choose rates on validation tasks, meta-train from every initialisation, test."""
    started = time.process_time()
    trainer = Trainer(method, config)
    measure = {s: make_measure(method.rule, config, s) for s in config.test_shots}
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
    losses, functions = [], None
    found: dict[int, list[np.ndarray]] = {shot: [] for shot in config.test_shots}
    for init in range(config.inits):
        params, history = trainer.train(rates, config.seed + init, config.meta_steps)
        losses.append(history)
        for shot, run in measure.items():
            errors, drawn = run(params, rates[0], "test", config.test_tasks)
            found[shot].append(errors)
            functions = drawn[:_DRAWN] if functions is None else functions
        first = found[config.test_shots[0]][-1].mean(0)
        say(
            f"initialisation {init}: error {first[0]:.3f} before, {first[1]:.3f} after "
            f"1, {first[-1]:.3f} after {config.test_steps} updates"
        )
    return Found(
        tuned.scores,
        np.array(losses),
        {shot: np.stack(errors) for shot, errors in found.items()},
        np.asarray(functions),
        sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params)),
        time.process_time() - started,
    )


def save(path: Path, found: Found) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {f"errors_{s}": e for s, e in found.errors.items()}
    arrays |= {k: np.asarray(v) for k, v in found._asdict().items() if k != "errors"}
    with atomic_write(path) as part:
        np.savez(part, **arrays)


def load(path: Path, shots: Sequence[int]) -> Found:
    """What `save` wrote; errors that exploded are infinite."""
    with np.load(path) as saved:
        fields = {k: saved[k] for k in Found._fields if k != "errors"}
        errors = {shot: saved[f"errors_{shot}"] for shot in shots}
    errors = {s: np.where(e < _DIVERGED, e, np.inf) for s, e in errors.items()}
    numbers = {"meta_parameters": int, "cpu_seconds": float}
    fields = {k: numbers[k](v) if k in numbers else v for k, v in fields.items()}
    return Found(errors=errors, **fields)


# -- figures ---------------------------------------------------------------------------


def error_figure(errors: Mapping[int, Mapping[str, np.ndarray]]) -> Figure:
    """Draw error against updates, a panel a number of points.

    ``errors``: per shot, per method [inits, tasks, T + 1]; the band is the 95% CI over
    tasks of a task's mean over initialisations.
    """
    panels = {}
    for shot, by_method in errors.items():
        panels[f"{shot} support points"] = {
            name: plots.Losses(np.arange(found.shape[-1]), found.mean(0))
            for name, found in by_method.items()
        }
    figure = plots.loss_panels(panels, learned=list(next(iter(errors.values()))))
    for axes in figure.axes:
        axes.set(xlabel="gradient steps on the new task", ylabel="mean squared error")
    return figure


def function_figure(
    tasks: Sequence[Mapping[str, np.ndarray]],
    grid: np.ndarray,
    functions: Mapping[str, np.ndarray],
    steps: Sequence[int],
) -> Figure:
    """Draw networks before and after adaptation, a row a task, a column a method.

    Args:
      tasks: each with its support points ``x`` and ``y`` and its ``curve`` on the grid.
      grid: [G].
      functions: per method [tasks, T + 1, G].
      steps: which updates to draw, the first as dots.
    """
    figure = _new_figure((3.2 * len(functions), 2.1 * len(tasks)))
    rows = figure.subplots(
        len(tasks), len(functions), sharex=True, sharey="row", squeeze=False
    )
    for row, task, index in zip(rows, tasks, range(len(tasks)), strict=True):
        for axes, (name, found) in zip(row, functions.items(), strict=True):
            axes.plot(grid, task["curve"], color="grey", lw=4, alpha=0.35, label="task")
            for number, step in enumerate(steps):
                label = _updates(step) if step else "before"
                style: dict[str, Any] = {"lw": 1.4, "ls": "-" if number else ":"}
                colour = _COLOURS[-1] if not number else _COLOURS[number - 1]
                axes.plot(grid, found[index, step], color=colour, label=label, **style)
            axes.plot(task["x"], task["y"], "k^", ms=5, label="support")
            if index == 0:
                axes.set_title(name, fontsize=10)
            axes.grid(alpha=0.3)
    rows[0][-1].legend(fontsize=7)
    return figure


def spread_figure(
    errors: Mapping[str, np.ndarray], steps: Sequence[int], *, shot: int
) -> Figure:
    """Draw the mean error of each initialisation, a panel a number of updates.

    ``errors``: per method [inits, tasks, T + 1].
    """
    figure = _new_figure((3.6 * len(steps), 3.2))
    for axes, step in zip(figure.subplots(1, len(steps)), steps, strict=True):
        for index, found in enumerate(errors.values()):
            means = found[..., step].mean(1)
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(np.full(len(means), index), means, "o", color=colour, alpha=0.6)
            axes.hlines(means.mean(), index - 0.3, index + 0.3, color=colour)
        axes.set(yscale="log", title=_updates(step), xticks=range(len(errors)))
        axes.set_xticklabels(errors, rotation=45, ha="right", fontsize=8)
        axes.grid(alpha=0.3, which="both", axis="y")
    figure.axes[0].set_ylabel(f"mean squared error, {shot} points")
    return figure


def _updates(number: int) -> str:
    return f"{number} update" + "s" * (number != 1)


def _new_figure(size: tuple[float, float]) -> Figure:
    return Figure(figsize=size, layout="constrained", dpi=100)
