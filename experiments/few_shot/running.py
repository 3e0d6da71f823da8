"""A run: every method meta-trained, tested on the same episodes, drawn, written."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from experiments.common import devices, report
from experiments.common.cli import replace
from experiments.common.command import run_in
from experiments.common.run_folder import (
    Metrics,
    free_folder,
    refuse_other_data,
    refuse_other_runs,
    write_json,
)
from experiments.common.saved_options import to_json
from experiments.common.script_end import stops_on_ctrl_c
from experiments.common.together import drive_together, seeds_mesh
from experiments.few_shot.command_line import MODULE
from experiments.few_shot.data import Source, load_source
from experiments.few_shot.figures import draw, draw_learning_curves
from experiments.few_shot.heading import header
from experiments.few_shot.methods import specs_of
from experiments.few_shot.options import Options
from experiments.few_shot.test import evaluate_again, meta_test, over_seeds
from experiments.few_shot.train import (
    Trainer,
    checkpoint_of,
    make_all_programs,
    may_change,
    seeds_at_once,
)
from metalstm.meta.fitting import Call, Stepped, drive
from metalstm.run_file import describe_methods
from metalstm.runtime import processes

ROOT = Path("runs") / "few_shot"


def choose_folder(options: Options) -> Path:
    """Where the run goes: as told, or a name that no other run has."""
    run, data = options.run, options.data
    dataset = data.dataset.replace("tfds:", "").replace("/", "-")
    name = f"{dataset}-{data.way}w{data.shot}s-{run.seed}"
    return run.resume or run.workdir or free_folder(ROOT / name)


def evaluate(options: Options, arguments: Sequence[str]) -> None:
    del arguments
    evaluate_again(options)


def run(options: Options, folder: Path) -> int:
    """Run in ``folder``; return the exit status, 130 for Ctrl-C.

    Raises:
      ValueError, FileNotFoundError: options or data that cannot work, before anything
        is compiled or written.
    """
    refuse_other_runs(folder, options, may_change(options))
    if options.run.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ImportError(
            "--tensorboard needs tensorboardX: pip install 'metalstm[tensorboard]'"
        )
    if at_once := seeds_at_once(options):
        mesh = seeds_mesh(options.run.seeds, options.devices.devices)
    else:
        batches = {own.training.meta_batch for own in options.methods.values()}
        meshes = [devices.mesh_for(options.devices, n, "--meta-batch") for n in batches]
        mesh = meshes[0]
    source = load_source(options.data, options.methods)
    source = source.placed(mesh, options.devices.devices)
    specs = specs_of(options, source.dataset.train.num_classes)
    programs = make_all_programs(options, specs, source)
    trainer = Trainer(options, specs, programs, source, folder)
    print(header(options, source, devices.describe(mesh)), flush=True)
    changeable = may_change(options)

    def body() -> None:
        if options.run.seeds == 1:
            drive(run_seed(trainer))
        else:
            run_seeds(trainer, mesh, at_once=at_once)

    return run_in(folder, options, changeable, body, MODULE)


def run_seed(trainer: Trainer) -> Generator[Call, Stepped, dict[str, Any]]:
    """One seed, one folder: meta-train, meta-test, draw, write.

    A generator, as `metalstm.meta.fitting.fit_steps` is.
    """
    options, specs, _, source, folder = trainer
    write_config(options, source, folder)
    if processes.is_main():
        describe_methods(
            folder,
            {name: (spec, checkpoint_of(name)) for name, spec in specs.items()},
            image_shape=source.dataset.image_shape,
            normalise=source.describe()["normalise"],
        )
    metrics = Metrics(folder, tensorboard=options.run.tensorboard)
    try:
        found = yield from trainer.learn(metrics)
    finally:
        metrics.close()
    results, table = meta_test(trainer, found)
    if processes.is_main():
        files = table.write(folder) + draw(trainer, found, results["methods"])
        _write_results(folder, results, files)
    return results


def run_seeds(trainer: Trainer, mesh: Mesh | None, *, at_once: bool) -> None:
    """Repeat with several seeds of meta-training, and aggregate over them.

    Args:
      mesh: whose devices share the seeds.
      at_once: train all seeds at the same time; else one after another.
    """
    options, folder = trainer.options, trainer.folder
    write_config(options, trainer.source, folder)
    seeds = range(options.run.seed, options.run.seed + options.run.seeds)

    def of_seed(seed: int) -> Generator[Call, Stepped, dict[str, Any]]:
        own = replace(options, run=replace(options.run, seed=seed, seeds=1))
        return run_seed(trainer._replace(options=own, folder=folder / f"seed-{seed}"))

    if at_once:
        print(f"seeds {seeds[0]} to {seeds[-1]} at the same time", flush=True)
        with stops_on_ctrl_c():
            found = drive_together([of_seed(seed) for seed in seeds], mesh)
    else:
        found = []
        for seed in seeds:
            print(f"seed {seed}")
            found.append(drive(of_seed(seed)))
    results, table = over_seeds(options, dict(zip(seeds, found, strict=True)))
    print(table)
    if processes.is_main():
        runs = [folder / f"seed-{seed}" for seed in seeds]
        curves = draw_learning_curves(options, runs, folder)
        _write_results(folder, results, [*table.write(folder), curves])


def _write_results(folder: Path, results: Any, files: Sequence[str]) -> None:
    write_json(folder / "results.json", results)
    print(report.ending(folder, ["results.json", *files]), flush=True)


def write_config(options: Options, source: Source, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "config": to_json(options),
        "data": source.describe(),
        "versions": report.versions(),
    }
    processes.on_main(lambda: refuse_other_data(folder, document["data"]))
    write_json(folder / "config.json", document)
