"""Do learned gates carry over to another learner, and which of their parts matter?

Claims (Ravi & Larochelle, 2017, section 3.2): one cell serves every coordinate, so a
rule is not tied to the learner it was trained on; it sees the loss, the gradient, the
parameter and its previous gates.

1. Transfer. Gates are meta-trained with theta_0 drawn afresh in every episode on one
   Conv4 width, and applied as they are to another width and to an MLP, against SGD
   whose rate is tuned for each of these learners on validation episodes.
2. Ablations of the gates in the same setting, one part taken away at a time.

    python -m experiments.studies.gate_study                       # glyphs
    python -m experiments.studies.gate_study --dataset omniglot --data-dir DIR

Writes table.md, results.json and gate_study.png to the workdir. The tables of
docs/results say on what machine they were made and how long it took.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.run_folder import write_json

SGD_RATES = tuple(10 ** (k / 4) for k in range(-8, 7))  # 0.01 to 32


@dataclass(frozen=True)
class Config:
    dataset: str = "glyphs"
    """glyphs or omniglot."""
    data_dir: Path | None = None
    """Where TFDS keeps omniglot."""
    way: int = 5
    shot: int = 5
    steps: int = 5
    """Inner updates."""
    meta_steps: int = 400
    """Meta-steps of each rule."""
    meta_batch: int = 4
    """Episodes of one meta-step."""
    hidden: int = 8
    filters: int = 16
    """Of the learner that the gates are trained on; the other has twice as many."""
    test_episodes: int = 600
    validation_episodes: int = 100
    seed: int = 0
    workdir: Path = Path("runs/gate_study")


ABLATIONS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "no first LSTM": {"hidden_size": 0},
    "f fixed at 1": {"forget": "one"},
    "i a learned constant": {"input": "constant"},
    "f = 1 and i constant (SGD)": {"forget": "one", "input": "constant"},
    "no loss input": {"loss_input": False},
    "no theta input": {"theta_input": False},
    "no previous gates": {"carry_input": False},
}


def main(config: Config) -> None:
    import jax
    import numpy as np

    from metalstm import adam_clipped, algorithms, data, first_order, nn, rules
    from metalstm.base import MetaParams
    from metalstm.meta import evaluation
    from metalstm.meta.fitting import fit, init_fit_state
    from metalstm.meta.step import init_train_state, make_train_loop

    if config.dataset == "omniglot":
        dataset = data.load_omniglot(config.data_dir)
    elif config.dataset == "glyphs":
        dataset = data.load_glyphs()
    else:
        raise SystemExit(f"error: --dataset {config.dataset}: glyphs or omniglot")
    spec = data.EpisodeSpec(way=config.way, shot=config.shot, queries=15)
    train_spec = dataclasses.replace(spec, queries=5)

    conv = lambda filters: nn.conv4(  # noqa: E731
        config.way, filters, downsample="stride", momentum=0.05
    )
    targets = {
        f"conv4-{config.filters}": conv(config.filters),
        f"conv4-{2 * config.filters}": conv(2 * config.filters),
        "mlp-64": nn.mlp(config.way, (64,)),
    }
    trained_on = next(iter(targets))
    options: dict[str, Any] = {
        "num_steps": config.steps,
        "differentiation": first_order(),
        "learn_init": False,
        "scan_unroll": config.steps,
    }

    def gates(**changes):
        # a first step of a useful size: i_0 = sigmoid(0) = 0.5
        start: dict[str, Any] = {
            "hidden_size": config.hidden,
            "forget_bias": (4.0, 5.0),
            "input_bias": (0.0, 0.0),
        }
        return rules.lstm_gates(**(start | changes))

    def meta_train(rule):
        algorithm = algorithms.learned_init(targets[trained_on], rule, **options)
        optimizer = adam_clipped(1e-2, 1.0)
        episode = spec.sample(jax.random.key(0), dataset.train)
        start = init_train_state(algorithm, optimizer, config.seed, episode)
        loop = make_train_loop(
            algorithm, optimizer, train_spec, num_tasks=config.meta_batch
        )
        started = time.monotonic()
        state = fit(
            loop,
            init_fit_state(start),
            dataset.train,
            num_steps=config.meta_steps,
            report=lambda step, m: print(
                f"  step {step:5d}  loss {m['loss']:.3f}  acc {m['accuracy']:.3f}",
                flush=True,
            ),
            report_every=max(config.meta_steps // 4, 1),
        )
        return state.train.params, time.monotonic() - started

    def tester(learner, rule, episodes, pool, split):
        algorithm = algorithms.learned_init(learner, rule, **options)
        run = evaluation.make_evaluate(algorithm, spec, batch_size=10)
        example = spec.sample(jax.random.key(0), dataset.train)
        start = algorithm.init(jax.random.key(0), example)

        def test(rule_params):
            params = MetaParams(start.learner, rule_params)
            return run(params, pool, num_episodes=episodes, split=split)

        return test

    rows, evaluations = [], {}

    def record(part, name, learner, result, **more):
        evaluations[part, name, learner] = result
        row = {"part": part, "rule": name, "learner": learner}
        row |= {"mean": result.mean, "ci95": result.ci95} | more
        rows.append(row)
        print(f"{part:10} {name:28} {learner:10} {result}", flush=True)

    trained = {}
    for name, changes in ABLATIONS.items():
        print(f"meta-training: {name}", flush=True)
        rule = gates(**changes)
        params, seconds = meta_train(rule)
        trained[name] = params.rule
        test = tester(
            targets[trained_on], rule, config.test_episodes, dataset.test, "test"
        )
        record("ablation", name, trained_on, test(params.rule), seconds=seconds)

    for learner_name, learner in targets.items():
        rule = gates()
        test = tester(learner, rule, config.test_episodes, dataset.test, "test")
        record("transfer", "learned gates", learner_name, test(trained["all parts"]))
        sgd = rules.learned_sgd()
        validate = tester(
            learner, sgd, config.validation_episodes, dataset.validation, "validation"
        )
        scores = [validate(np.float32(rate)).mean for rate in SGD_RATES]
        best = int(np.argmax(scores))
        test = tester(learner, sgd, config.test_episodes, dataset.test, "test")
        record(
            "transfer",
            "tuned SGD",
            learner_name,
            test(np.float32(SGD_RATES[best])),
            rate=SGD_RATES[best],
            rate_inside_grid=0 < best < len(SGD_RATES) - 1,
        )
    _write(config, dataset, rows, evaluations, trained_on)


def _write(config, dataset, rows, evaluations, trained_on) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from metalstm.meta.evaluation import paired_difference

    setting = (
        f"{dataset.name}, {config.way}-way {config.shot}-shot, {config.steps} updates, "
        "theta_0 drawn in every episode, first order, batch norm: support (inductive), "
        f"{config.meta_steps} meta-steps of {config.meta_batch} episodes, seed "
        f"{config.seed}, {config.test_episodes} test episodes."
    )
    lines = [
        setting,
        "",
        "| part | rule | learner | accuracy % (95% CI) | paired difference | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        key = row["part"], row["rule"], row["learner"]
        reference = (
            ("ablation", "all parts", trained_on)
            if row["part"] == "ablation"
            else ("transfer", "tuned SGD", row["learner"])
        )
        difference = ""
        if key != reference and reference in evaluations:
            mean, ci = paired_difference(evaluations[key], evaluations[reference])
            difference = f"{100 * mean:+.1f} ± {100 * ci:.1f}"
            row |= {"difference": mean, "difference_ci95": ci}
        note = f"rate {row['rate']:.3g}" if "rate" in row else ""
        if row.get("rate_inside_grid") is False:
            note += " (at the edge of the grid)"
        lines.append(
            f"| {row['part']} | {row['rule']} | {row['learner']} | "
            f"{100 * row['mean']:.1f} ± {100 * row['ci95']:.1f} | {difference} | "
            f"{note} |"
        )
    from metalstm.runtime.files import atomic_write

    config.workdir.mkdir(parents=True, exist_ok=True)
    with atomic_write(config.workdir / "table.md") as unfinished:
        unfinished.write_text("\n".join(lines) + "\n")
    settings = dataclasses.asdict(config)
    del settings["data_dir"], settings["workdir"]  # say nothing of the result
    document = {"config": settings, "rows": rows}
    document["checksum"] = dataset.checksum
    document = json.loads(json.dumps(document, default=str))
    write_json(config.workdir / "results.json", document)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, part in zip(axes, ("ablation", "transfer"), strict=True):
        chosen = [row for row in rows if row["part"] == part]
        names = [
            row["rule"] if part == "ablation" else f"{row['learner']}\n{row['rule']}"
            for row in chosen
        ]
        axis.barh(
            names,
            [100 * row["mean"] for row in chosen],
            xerr=[100 * row["ci95"] for row in chosen],
            color=["C1" if row["rule"] == "tuned SGD" else "C0" for row in chosen],
        )
        axis.invert_yaxis()
        axis.set_xlabel("meta-test accuracy, %")
        axis.set_title(part)
    with atomic_write(config.workdir / "gate_study.png") as unfinished:
        figure.savefig(unfinished, dpi=120)
    print("\n".join(lines))
    print(f"table.md, results.json, gate_study.png in {config.workdir}")


if __name__ == "__main__":
    chosen = tyro.cli(Config)
    keep_compiled_programs()
    main(chosen)
