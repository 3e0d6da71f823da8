"""Meta-test: rates tuned on validation, one set of episodes for all, what gates did."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metalstm
from experiments.few_shot.data import Source
from experiments.few_shot.methods import HAND_MADE, METHODS, Spec, theta_donor
from experiments.few_shot.options import Config
from metalstm.base import MetaParams, PyTree
from metalstm.data import episode_key
from metalstm.plots import layer_groups
from metalstm.runs import build_learner, example_episode
from metalstm.runtime import checkpoints, sharding

_STEP_SHARES = (0.05, 0.2, 0.5)  # of --finetune-steps, beside all of them
_MOST_EXTENSIONS = 4  # of a grid whose best is at its edge


class Tuned(NamedTuple):
    params: PyTree
    rate: float
    tried: dict[float, float]  # rate -> validation accuracy
    steps: int | None = None  # of fine-tuning
    tried_steps: dict[int, float] | None = None


def untrained_params(
    method: str,
    algorithm: metalstm.MetaAlgorithm,
    config: Config,
    source: Source,
    learned: dict[str, PyTree],
) -> PyTree:
    """What a method that is not meta-trained starts from, its rate not yet tuned."""
    data = config.data
    episode = example_episode(source.dataset.image_shape, data.way, data.shot)
    params = algorithm.init(jax.random.key(config.run.seed), episode)
    if METHODS[method].family == HAND_MADE:
        donor = theta_donor(config.methods.algorithms)
        assert donor is not None, "refused by experiments.few_shot.command_line.check"
        params = MetaParams(learned[donor].learner, params.rule)
    return params


def tune_rate(
    method: str,
    params: PyTree,
    evaluate: Callable[..., metalstm.Evaluation],
    config: Config,
    source: Source,
) -> Tuned:
    """Choose the learning rate on meta-validation, from a grid that brackets it.

    Where the rule knows a number of steps, that is chosen next, at the best rate.
    """

    def score(rate: float, steps: int | None = None) -> float:
        result = evaluate(
            with_rate(params, rate, steps),
            source.dataset.validation,
            num_episodes=config.budget.validation_episodes,
            split="validation",
        )
        return result.mean

    rate, tried = bracketed_best(METHODS[method].rates, score)
    if "num_steps" not in params.rule:
        return Tuned(with_rate(params, rate), rate, tried)
    most = config.methods.finetune_steps
    fewer = {max(1, round(share * most)) for share in _STEP_SHARES} - {most}
    tried_steps = {steps: score(rate, steps) for steps in sorted(fewer)}
    tried_steps[most] = tried[rate]
    steps = max(tried_steps, key=lambda steps: tried_steps[steps])
    return Tuned(with_rate(params, rate, steps), rate, tried, steps, tried_steps)


def bracketed_best(
    grid: Sequence[float], score: Callable[[float], float]
) -> tuple[float, dict[float, float]]:
    """The best rate of a geometric grid, extended while the best is at its edge."""
    tried = {rate: score(rate) for rate in grid}
    for _ in range(_MOST_EXTENSIONS):
        rates = sorted(tried)
        best = max(rates, key=lambda rate: tried[rate])
        if best == rates[0]:
            further = rates[0] ** 2 / rates[1]
        elif best == rates[-1]:
            further = rates[-1] ** 2 / rates[-2]
        else:
            break
        tried[further] = score(further)
    return max(tried, key=lambda rate: tried[rate]), tried


def with_rate(params: MetaParams, rate: float, steps: int | None = None) -> MetaParams:
    rule = params.rule | {"learning_rate": jnp.float32(rate)}
    if steps is not None:
        rule["num_steps"] = jnp.float32(steps)
    return params._replace(rule=rule)


def save_best(folder: Path, method: str, params: PyTree, **metadata: Any) -> None:
    """Keep what was not meta-trained too, so that every method can be loaded again."""
    if jax.tree.leaves(params):
        path = folder / "checkpoints" / method / "best"
        checkpoints.save(path, params, step=0, metadata=metadata, keep=1)


def count_parameters(params: PyTree, spec: Spec) -> int:
    """How many numbers were learned: theta_0 and the rule's."""
    if spec["algorithm"]["name"] in ("from_scratch", "nearest_neighbour"):
        return 0
    if isinstance(params, MetaParams):
        learned = (params.learner.params, params.rule)
        tuned = spec["algorithm"]["name"] == "fine_tuning"
        if tuned or not spec["algorithm"]["options"].get("trainable", True):
            learned = (params.learner.params, ())
    else:
        learned = params.params
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(learned))


class Gates(NamedTuple):
    forget: np.ndarray  # [tasks, T, N]
    input: np.ndarray  # [tasks, T, N]
    layers: list[tuple[str, np.ndarray]]

    def summary(self) -> dict[str, float]:
        """Mean f and i, and how far i's means differ over tasks, layers and steps."""
        spread = {
            "tasks": self.input.mean((1, 2)),
            "steps": self.input.mean((0, 2)),
            "layers": np.array([self.input[:, :, c].mean() for _, c in self.layers]),
        }
        return {
            "mean_f": float(self.forget.mean()),
            "mean_i": float(self.input.mean()),
            **{f"std_i_over_{name}": float(v.std()) for name, v in spread.items()},
        }


def observe_gates(
    algorithm: metalstm.MetaAlgorithm,
    params: PyTree,
    source: Source,
    *,
    num_tasks: int = 10,
) -> Gates | None:
    """Adapt to some test episodes and record the gates; None when there are none."""
    adapt = algorithm.adapt
    if adapt is None:
        return None

    @jax.jit
    def observe(params: PyTree, pool: Any, task: jax.Array) -> Any:
        key = episode_key(0, "test", 0, task)
        episode = source.test.sample(key, pool)
        inner, trace = adapt(params, key, episode.support, num_classes=source.test.way)
        return inner.params, trace.observed

    observed, theta = [], None
    pool = sharding.local(source.dataset.test)
    for task in range(num_tasks):
        theta, gates = observe(params, pool, jnp.int32(task))
        if not gates:
            return None
        observed.append(jax.device_get(gates))
    return Gates(
        np.stack([gates["forget"] for gates in observed]),
        np.stack([gates["input"] for gates in observed]),
        layer_groups(theta),
    )


class Picture(NamedTuple):
    support: tuple[np.ndarray, np.ndarray]
    query: tuple[np.ndarray, np.ndarray]
    before: np.ndarray  # [M] labels at theta_0
    after: np.ndarray  # [M] labels at theta_T


def one_episode(
    spec: Spec,
    algorithm: metalstm.MetaAlgorithm,
    params: PyTree,
    source: Source,
) -> Picture | None:
    """The first test episode and its predictions before and after adaptation.

    Before: the start of the learner, normalised by the support set. None for a method
    that does not adapt a learner.
    """
    if algorithm.adapt is None or not isinstance(params, MetaParams):
        return None
    learner = build_learner(spec["learner"], spec["way"])
    key = episode_key(0, "test", 0, 0)
    pool = sharding.local(source.dataset.test)
    episode = jax.jit(source.test.sample)(key, pool)
    way = source.test.way

    @jax.jit
    def before(params: MetaParams, support_x: jax.Array, query_x: jax.Array) -> Any:
        state = params.learner
        if not jax.tree.leaves(state.params):  # drawn afresh for every episode
            state = learner.init(key, support_x)
        if learner.at_way is not None:
            state = state._replace(params=learner.at_way(state.params, way))
        _, gathered = learner.apply(state, support_x, norm="gather")
        return learner.apply(gathered, query_x, norm="stored")[0].argmax(-1)

    @jax.jit
    def after(params: MetaParams, support: Any, query_x: jax.Array) -> jax.Array:
        scores = algorithm.predict(params, key, support, query_x, num_classes=way)
        return scores.argmax(-1)

    support, query = jax.device_get((episode.support, episode.query))
    return Picture(
        (_displayable(support.x, source), support.y),
        (_displayable(query.x, source), query.y),
        np.asarray(before(params, episode.support.x, episode.query.x)),
        np.asarray(after(params, episode.support, episode.query.x)),
    )


def _displayable(x: np.ndarray, source: Source) -> np.ndarray:
    if source.test.normalise is None:
        return x
    mean, std = (np.asarray(a) for a in source.test.normalise)
    return x * std + mean


def over_seeds(means: Sequence[float]) -> tuple[float, float]:
    """Mean and half the 95% confidence interval over meta-training seeds."""
    values = np.asarray(means)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0
    return float(values.mean()), float(half)
