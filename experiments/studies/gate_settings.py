"""What does each setting of the Meta-LSTM's gates do?

Claim: the start of i (times the gradient's scale) decides whether a short meta-training
learns; hidden units, separate biases and the start of f matter less. Each setting is
changed alone, everything else as in `algorithms.meta_lstm`.

    python -m experiments.studies.gate_settings

Letters of 14 x 14 pixels, 5-way 1-shot, an MLP of 32 hidden units; Adam 1e-3 on 4 tasks
a meta-step. Ten minutes on a CPU core. docs/choosing_gate_settings.md has the figures
and says what they mean.

Each setting is kept in --workdir, so that a stopped study resumes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

import metalstm
from experiments.common.cli import Count, Names, check_names
from experiments.common.study import Made, Study, StudyOptions, kept
from experiments.common.tables import Table
from metalstm import algorithms, data, nn, plots, rules
from metalstm.algorithms.gradient.published import DEFAULT_GATES
from metalstm.base import MetaAlgorithm
from metalstm.statistics import mean_and_ci95

_STEPS = 5  # updates, where they are not what is changed
_EPISODES, _OPTIMIZER = data.EpisodeSpec(5, 1, 5), metalstm.adam_clipped(1e-3, 1.0)


class Choice(NamedTuple):
    """A value of a setting: changes to the gates, and to `algorithms.meta_lstm`."""

    label: float | str  # a number where the setting has a scale
    gates: Mapping[str, Any] = MappingProxyType({})
    loop: Mapping[str, Any] = MappingProxyType({})


def _bias(gate: str, share: float, logit: float) -> Choice:
    return Choice(share, {f"{gate}_bias": (logit, logit)})


SETTINGS: dict[str, tuple[Choice, ...]] = {
    "input_bias": tuple(
        _bias("input", round(1 / (1 + np.exp(-logit)), 4), logit)
        for logit in (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0)
    ),
    "forget_bias": tuple(
        _bias("forget", float(f"{1 / (1 + np.exp(logit)):.2g}"), logit)
        for logit in (9.0, 7.0, 5.0, 3.0, 1.0)
    ),
    "gradient_scale": tuple(
        Choice(str(scale), {}, {"gradient_scale": scale})
        for scale in ("1/batch", 1.0, "way", "calibrated")
    ),
    "hidden_size": tuple(
        Choice(str(size), {"hidden_size": size}) for size in (0, 4, 20)
    ),
    "bias_per": tuple(
        Choice(per.replace("_", " "), {"bias_per": per, "num_bias_steps": _STEPS})
        for per in ("rule", "tensor", "tensor_and_step")
    ),
    "order and features": (
        Choice("second", {}),
        Choice("first", {}, {"differentiation": metalstm.first_order()}),
        Choice("second, full", {"feature_gradient": "full"}),
    ),
    "num_steps": tuple(
        Choice(str(steps), {}, {"num_steps": steps}) for steps in (1, 2, 5, 10)
    ),
}
# The panels: a title, and the value that is the default.
PANELS: dict[str, tuple[str, Any]] = {
    "input_bias": ("i at the start (input_bias)", SETTINGS["input_bias"][4].label),
    "forget_bias": ("1 - f at the start (forget_bias)", 0.00091),
    "gradient_scale": ("gradient_scale", "calibrated"),
    "hidden_size": ("hidden_size", "4"),
    "bias_per": ("bias_per", "rule"),
    "order and features": ("order, feature_gradient", "second"),
}


class Config(StudyOptions, frozen=True, kw_only=True):
    settings: Names = tuple(SETTINGS)
    seeds: Count = 3
    meta_steps: Count = 200
    """Of 4 tasks."""
    test_episodes: Count = 200
    test_steps: tuple[Count, ...] = (1, 2, 3, 5, 10, 20)
    """Updates at meta-test of those trained with other numbers of them."""


class Tested(NamedTuple):
    accuracies: np.ndarray  # [seeds, numbers of updates at meta-test, episodes]


@functools.cache
def pools() -> dict[str, data.ClassPool]:
    """The letters in 14 x 14 pixels, [0, 1]."""
    letters = data.load_glyphs()
    small = {}
    for split in data.SPLITS:
        pool = letters.pool(split)
        pixels = np.asarray(pool.images, np.float32) / 255
        halved = pixels.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))
        classes = halved.reshape(pool.num_classes, -1, 14, 14, 1)
        small[split] = data.make_pool(classes, groups=np.asarray(pool.groups))
    return small


def algorithm_of(choice: Choice, **more: Any) -> MetaAlgorithm:
    rule = rules.lstm_gates(**(DEFAULT_GATES | dict(choice.gates)))
    options: dict[str, Any] = {"num_steps": _STEPS, **choice.loop, **more}
    return algorithms.meta_lstm(nn.mlp(5, (32,)), rule, **options)


class Programs:
    """Compiled once for all choices that only start elsewhere, and all seeds."""

    def __init__(self, choice: Choice):
        self.choice = choice
        self.train = metalstm.make_train_loop(
            algorithm_of(choice), _OPTIMIZER, _EPISODES, num_tasks=4, steps_per_call=10
        )

    @functools.cache  # noqa: B019 (as many as there are programs)
    def test(self, steps: int) -> Any:
        algorithm = algorithm_of(self.choice, num_test_steps=steps)
        return metalstm.make_evaluate(algorithm, _EPISODES, batch_size=20)


def measure(
    choice: Choice, programs: Programs, test_steps: tuple[int, ...], config: Config
) -> Tested:
    """Meta-train with each seed, and test after each number of updates."""
    train, test, number = pools()["train"], pools()["test"], config.test_episodes
    episode = _EPISODES.sample(jax.random.key(0), train)
    algorithm = algorithm_of(choice)
    start = jax.jit(
        lambda seed: metalstm.init_train_state(algorithm, _OPTIMIZER, seed, episode)
    )
    found = []
    for seed in range(config.seed, config.seed + config.seeds):
        state = start(np.uint32(seed))
        for _ in range(-(-config.meta_steps // 10)):
            state, _ = programs.train(state, train)
        tested = [
            programs.test(steps)(state.params, test, num_episodes=number)
            for steps in test_steps
        ]
        found.append([one.accuracies for one in tested])
    return Tested(np.array(found))


def run(config: Config, folder: Path) -> Made:
    rows, found = [], {}
    for setting in config.settings:
        found[setting] = of_setting(setting, config, folder)
        for label, accuracies in found[setting].items():
            for index, steps in enumerate(_test_steps(setting, config)):
                after = f", {steps} at meta-test" if setting == "num_steps" else ""
                rows.append((setting, f"{label}{after}", _said(accuracies[:, index])))
    caption = (
        f"letters 14 x 14, 5-way 1-shot, MLP 32, {config.seeds} seeds, "
        f"{config.meta_steps} meta-steps of 4 tasks, test accuracy, %"
    )
    table = Table(caption, ("setting", "value", "accuracy"), rows, left=(0, 1))
    results = {
        setting: {str(label): one.mean(2).tolist() for label, one in by_label.items()}
        for setting, by_label in found.items()
    }
    return Made([table], {"settings": results}, figures(found, config))


def of_setting(setting: str, config: Config, folder: Path) -> dict[Any, np.ndarray]:
    """Per value, accuracies [seeds, numbers of updates at meta-test, episodes]."""
    steps, programs, found = _test_steps(setting, config), None, {}
    for choice in SETTINGS[setting]:
        if programs is None or not setting.endswith("_bias"):
            programs = Programs(choice)
        make = functools.partial(measure, choice, programs, steps, config)
        file = f"{setting}-{choice.label}.npz".replace("/", "-")
        tested = kept(folder / "tested" / file, Tested, make).accuracies
        found[choice.label] = tested
        said = ", ".join(_said(tested[:, k]) for k in range(len(steps)))
        print(f"{setting}  {choice.label}  {said}", flush=True)
    return found


def figures(
    found: Mapping[str, Mapping[Any, np.ndarray]], config: Config
) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    shown = {s: PANELS[s] for s in found if s in PANELS}
    if shown:
        panels = {
            title: {label: one[:, 0].mean(1) for label, one in found[setting].items()}
            for setting, (title, _) in shown.items()
        }
        default = dict(shown.values())
        drawn["settings.png"] = plots.setting_panels(
            panels, default=default, chance=0.2
        )
    if "num_steps" in found:
        sweeps = {}
        for trained, one in found["num_steps"].items():
            points = zip(config.test_steps, np.swapaxes(one, 0, 1), strict=True)
            of_one = [(x, *mean_and_ci95(y.mean(0))) for x, y in points]
            sweeps[f"T = {trained}"] = of_one
        drawn["updates.png"] = plots.accuracy_sweep(
            sweeps,
            dict.fromkeys(sweeps, "meta-lstm"),
            xlabel="updates at meta-test",
            title="letters, 5-way 1-shot; T: updates in meta-training",
        )
    return drawn


def _test_steps(setting: str, config: Config) -> tuple[int, ...]:
    return config.test_steps if setting == "num_steps" else (_STEPS,)


def _said(accuracies: np.ndarray) -> str:
    mean, ci95 = mean_and_ci95(accuracies.mean(0))  # all seeds have the same episodes
    return f"{100 * mean:.1f} ± {100 * ci95:.1f}"


def check(config: Config) -> None:
    check_names("--settings", config.settings, SETTINGS)


STUDY = Study(
    "gate_settings", Config(), run, __doc__, check=check, may_change=("settings",)
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
