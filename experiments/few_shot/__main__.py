"""Learn to learn from few examples: the Meta-LSTM and its baselines in one table.

Claim: a learned update rule with a learned start adapts to new classes from a few
images, above fixed rules and baselines (Ravi & Larochelle, ICLR 2017; Finn et al.,
2017).

    python -m experiments.few_shot                          # letters, no download
    python -m experiments.few_shot --preset omniglot --data-dir DIR
    python -m experiments.few_shot --preset ravi-5shot --data-dir DIR
    python -m experiments.few_shot --preset omniglot --data-dir DIR --algorithms all
    python -m experiments.few_shot --evaluate RUN --query-norm all
    python -m experiments.few_shot --evaluate RUN RUN2      # in one table
    python -m experiments.few_shot --help meta-lstm         # one method's own flags

docs/results/ has the tables, with the commands, the hardware and the time they took.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common import devices
from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.saved_options import to_json
from experiments.common.script_end import exit_status, what_is_kept
from experiments.few_shot.command_line import parse, parse_evaluation
from experiments.few_shot.methods import Spec, specs_of
from experiments.few_shot.options import Options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.few_shot.data import Source
    from experiments.few_shot.train import Programs

ROOT = Path("runs") / "few_shot"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a mistake, 130 for Ctrl-C."""
    folder: Path | None = None

    def body(arguments: list[str]) -> int:
        nonlocal folder
        if "--evaluate" in (word.split("=")[0] for word in arguments):
            _evaluate(arguments)
            return 0
        options = parse(arguments)
        keep_compiled_programs()
        devices.join(options.devices)
        folder = _choose_folder(options)
        return _run(options, folder)

    def stopped() -> str:
        return what_is_kept(folder, resume_hint)

    return exit_status(body, arguments, stopped=stopped)


def resume_hint(folder: Path) -> str:
    from experiments.common import report

    return report.resume_hint(folder)


def _evaluate(arguments: list[str]) -> None:
    options, anew = parse_evaluation(arguments)
    keep_compiled_programs()
    devices.join(options.devices)
    from experiments.few_shot.test import evaluate_again

    evaluate_again(options, anew)


def _choose_folder(options: Options) -> Path:
    """Where the run goes: as told, or a name that no other run has."""
    from experiments.common.run_folder import free_folder

    run, data = options.run, options.data
    if chosen := run.resume or run.workdir:
        return chosen
    dataset = data.dataset.replace("tfds:", "").replace("/", "-")
    return free_folder(ROOT / f"{dataset}-{data.way}w{data.shot}s-{run.seed}")


def _run(options: Options, folder: Path) -> int:
    from experiments.common.run_folder import locked, refuse_other_runs
    from experiments.few_shot.train import make_all_programs, may_change

    refuse_other_runs(folder, options, may_change(options))
    if options.run.tensorboard:
        require_tensorboard()
    from experiments.common.stopping import Interrupted
    from experiments.few_shot.data import load_source
    from experiments.few_shot.heading import header

    # of all methods: the mesh of each is made for its own --meta-batch
    batches = {own.training.meta_batch for own in options.methods.values()}
    meshes = [devices.mesh_for(options.devices, n, "--meta-batch") for n in batches]
    mesh = meshes[0]
    source = load_source(options.data, options.methods)
    source = source.placed(mesh, options.devices.devices)
    specs = specs_of(options, source.dataset.train.num_classes)
    programs = make_all_programs(options, specs, source)
    print(header(options, source, devices.describe(mesh)), flush=True)
    if devices.is_one_of_several():
        print(resume_hint(folder), flush=True)  # a process may die
    with locked(folder, options, may_change(options)):
        try:
            if options.run.seeds == 1:
                run_seed(options, specs, source, folder, programs)
            else:
                run_seeds(options, specs, source, folder, programs)
        except Interrupted:
            print(f"stopped and saved; {resume_hint(folder)}")
            return 130
    return 0


def run_seed(
    options: Options,
    specs: Mapping[str, Spec],
    source: Source,
    folder: Path,
    programs: Mapping[str, Programs],
) -> dict[str, Any]:
    """One seed, one folder: meta-train, meta-test, draw, write."""
    from experiments.common import report
    from experiments.common.run_folder import Metrics, write_json
    from experiments.few_shot.figures import draw
    from experiments.few_shot.test import meta_test
    from experiments.few_shot.train import Trainer
    from metalstm.runtime import processes

    write_config(options, source, folder, specs)
    metrics = Metrics(folder, tensorboard=options.run.tensorboard)
    run = Trainer(options, specs, programs, source, folder, metrics)
    try:
        found = run.learn()
    finally:
        metrics.close()
    results, table = meta_test(run, found)
    if not processes.is_main():
        return results
    files = ["results.json", *table.write(folder)]
    files += draw(run, found, results["methods"])
    write_json(folder / "results.json", results)
    print(report.ending(folder, files), flush=True)
    return results


def run_seeds(
    options: Options,
    specs: Mapping[str, Spec],
    source: Source,
    folder: Path,
    programs: Mapping[str, Programs],
) -> dict[str, Any]:
    """Repeat with several seeds of meta-training, and aggregate over them."""
    from experiments.common import report
    from experiments.common.run_folder import write_json
    from experiments.few_shot.figures import draw_learning_curves
    from experiments.few_shot.test import over_seeds
    from metalstm.runtime import processes

    write_config(options, source, folder)
    per_seed, first = {}, options.run.seed
    for seed in range(first, first + options.run.seeds):
        print(f"seed {seed}")
        run = dataclasses.replace(options.run, seed=seed, seeds=1)
        own = dataclasses.replace(options, run=run)
        there = folder / f"seed-{seed}"
        per_seed[seed] = run_seed(own, specs, source, there, programs)
    results, table = over_seeds(options, per_seed)
    if not processes.is_main():
        return results
    print(table)
    files = ["results.json", *table.write(folder)]
    write_json(folder / "results.json", results)
    runs = [folder / f"seed-{seed}" for seed in per_seed]
    files.append(draw_learning_curves(options.data, runs, folder))
    print(report.ending(folder, files), flush=True)
    return results


def write_config(
    options: Options,
    source: Source,
    folder: Path,
    specs: Mapping[str, Spec] | None = None,
) -> None:
    """Write the options; with ``specs``, also what `metalstm.load_run` reads."""
    from experiments.common import report
    from experiments.common.run_folder import refuse_other_data, write_json
    from experiments.few_shot.train import checkpoint_of
    from metalstm.predictor import describe_methods
    from metalstm.runtime import processes

    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "config": to_json(options),
        "data": source.describe(),
        "versions": report.versions(),
    }
    processes.on_main(lambda: refuse_other_data(folder, document["data"]))
    write_json(folder / "config.json", document)
    if specs is not None and processes.is_main():
        describe_methods(
            folder,
            {name: (spec, checkpoint_of(name)) for name, spec in specs.items()},
            image_shape=source.dataset.image_shape,
            normalise=document["data"]["normalise"],
        )


def require_tensorboard() -> None:
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise ImportError(
            "--tensorboard needs tensorboardX: pip install 'metalstm[tensorboard]'"
        ) from None


if __name__ == "__main__":
    devices.exit_with(main)
