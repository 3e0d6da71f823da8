"""The figures of a run: learning curves, what the gates did, one episode, bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metalstm
from experiments.common import report
from experiments.common.run_folder import Metrics
from experiments.few_shot.data import Source
from experiments.few_shot.methods import Spec
from experiments.few_shot.options import Options
from experiments.few_shot.train import Found, Trainer
from metalstm import plots
from metalstm.base import MetaParams, PyTree
from metalstm.data import episode_key
from metalstm.plots import layer_groups
from metalstm.runtime import sharding
from metalstm.specs import build_learner, learner_spec


def draw(
    run: Trainer, found: Mapping[str, Found], methods: dict[str, Any]
) -> list[str]:
    """Draw what applies, add what the gates did to the results; return file names."""
    files, folder, data = [], run.folder, run.options.data

    def save(figure: Any, name: str) -> None:
        files.append(report.save_figure(figure, folder / name))

    if any(one.is_trained for one in found.values()):
        files.append(draw_learning_curves(run.options, [folder], folder))
    if "meta-lstm" in found:
        algorithm = run.programs["meta-lstm"].algorithm
        gates = observe_gates(algorithm, found["meta-lstm"].params, run.source)
        if gates is not None:
            methods["meta-lstm"]["gates"] = gates.summary()
            print(gates, flush=True)
            save(plots.gate_distributions(*gates), "gates.png")
    name, spec = next(iter(run.specs.items()))
    algorithm, params = run.programs[name].algorithm, found[name].params
    if algorithm.adapt is not None and isinstance(params, MetaParams):
        save(_one_episode(spec, algorithm, params, run.source), "episode.png")
    bars = {name: (row["accuracy"], row["ci95"]) for name, row in methods.items()}
    save(
        plots.accuracy_bars(bars, chance=1 / data.way, title=folder.name),
        "accuracy.png",
    )
    return files


def draw_learning_curves(options: Options, runs: Sequence[Path], folder: Path) -> str:
    metrics = [Metrics(run) for run in runs]
    data, way = options.data, options.data.way
    rows = [row for run in metrics for row in run.read()]
    drawn = dict.fromkeys(row["method"] for row in rows)

    def by_method(kind: str, value: str) -> dict[str, list[plots.Curve]]:
        return {n: [run.curve(n, kind, value) for run in metrics] for n in drawn}

    trained = [own.method for name, own in options.methods.items() if name in drawn]
    ways = {getattr(method, "train_way", None) or way for method in trained}
    other = f"{min(ways)}-way " if len(ways) == 1 and ways != {way} else ""
    figure = plots.learning_curves(
        by_method("train", "loss"),
        by_method("train", "accuracy"),
        by_method("validation", "accuracy"),
        title=f"{data.dataset}, {data.way}-way {data.shot}-shot",
        chance=1 / data.way,
        train_tasks=f"{other}meta-training tasks",
    )
    return report.save_figure(figure, folder / "learning_curve.png")


class Gates(NamedTuple):
    forget: np.ndarray  # [tasks, T, N]
    input: np.ndarray  # [tasks, T, N]
    layers: list[tuple[str, np.ndarray]]

    def summary(self) -> dict[str, Any]:
        """Means, and what the gates' logarithms vary with."""
        return {
            "mean_f": float(self.forget.mean()),
            "mean_i": float(self.input.mean()),
            "forgotten_varies": self._variation("forget")._asdict(),
            "input_varies": self._variation("input")._asdict(),
        }

    def __str__(self) -> str:
        return (
            f"gates: mean f {self.forget.mean():.4f}, mean i {self.input.mean():.4f}; "
            f"i {self._variation('input')}; 1 - f {self._variation('forget')}"
        )

    def _variation(self, gate: Literal["forget", "input"]) -> plots.GateVariation:
        values = 1 - self.forget if gate == "forget" else self.input
        return plots.gate_variation(values, self.layers)


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


def _one_episode(
    spec: Spec,
    algorithm: metalstm.MetaAlgorithm,
    params: MetaParams,
    source: Source,
) -> Any:
    """The first test episode and its predictions before and after adaptation.

    Before: the start of the learner, normalised by the support set.
    """
    learner = build_learner(learner_spec(spec) or {})
    key = episode_key(0, "test", 0, 0)
    episode = jax.jit(source.test.sample)(key, sharding.local(source.dataset.test))
    way = source.test.way

    @jax.jit
    def labels(params: MetaParams, support: Any, query_x: jax.Array) -> Any:
        state = params.learner
        if not jax.tree.leaves(state.params):  # drawn afresh for every episode
            state = learner.init(key, support.x)
        if learner.at_way is not None:
            state = state._replace(params=learner.at_way(state.params, way))
        _, gathered = learner.apply(state, support.x, norm="gather")
        before, _ = learner.apply(gathered, query_x, norm="stored")
        after = algorithm.predict(params, key, support, query_x, num_classes=way)
        return before.argmax(-1), after.argmax(-1)

    before, after = labels(params, episode.support, episode.query.x)
    support, query = (
        (_displayable(batch.x, source), batch.y) for batch in jax.device_get(episode)
    )
    return plots.episode_picture(support, query, np.asarray(before), np.asarray(after))


def _displayable(x: np.ndarray, source: Source) -> np.ndarray:
    if source.test.normalise is None:
        return x
    mean, std = (np.asarray(a) for a in source.test.normalise)
    return x * std + mean
