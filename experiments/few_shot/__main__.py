"""Learn to learn from few examples: the Meta-LSTM and its baselines in one table.

Claim: a learned update rule with a learned start adapts to new classes from a few
images, above fixed rules and floors (Ravi & Larochelle, ICLR 2017; Finn et al., 2017).

    python -m experiments.few_shot                          # letters, no download
    python -m experiments.few_shot --preset omniglot --data-dir DIR
    python -m experiments.few_shot --preset ravi-5shot --data-dir DIR
    python -m experiments.few_shot --preset omniglot --data-dir DIR --algorithms all
    python -m experiments.few_shot --evaluate RUN --query-norm all
    python -m experiments.few_shot --evaluate RUN RUN2      # in one table

docs/results/ has the tables, with the commands, the hardware and the time they took.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common import devices
from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.script_end import exit_status, what_is_kept
from experiments.few_shot.command_line import as_flags, given, parse
from experiments.few_shot.options import Config, may_change

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path("runs") / "few_shot"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a mistake, 130 for Ctrl-C."""
    folder: Path | None = None

    def body(arguments: list[str]) -> int:
        nonlocal folder
        config = parse(arguments)
        keep_compiled_programs()
        devices.join(config.devices)
        if config.run.evaluate:
            from experiments.few_shot.reevaluation import reevaluate

            reevaluate(config, given(arguments))
            return 0
        folder = _choose_folder(config)
        return _run(config, folder)

    def stopped() -> str:
        return what_is_kept(folder, how_to_go_on)

    return exit_status(body, arguments, stopped=stopped, in_flags=as_flags)


def _choose_folder(config: Config) -> Path:
    """Where the run goes: as told, or a name that no other run has."""
    from experiments.common.run_folder import free_folder

    if chosen := config.run.resume or config.run.workdir:
        return chosen
    data = config.data
    dataset = data.dataset.replace("tfds:", "").replace("/", "-")
    return free_folder(ROOT / f"{dataset}-{data.way}w{data.shot}s-{config.run.seed}")


def _run(config: Config, folder: Path) -> int:
    from experiments.common.run_folder import locked, refuse_other_runs

    refuse_other_runs(folder, config, may_change(config))
    if config.run.tensorboard:
        require_tensorboard()
    from experiments.common.report import header
    from experiments.common.stopping import Interrupted
    from experiments.few_shot.comparison import run_seed, run_seeds
    from experiments.few_shot.data import load_source

    mesh = devices.mesh_for(config.devices, config.budget.meta_batch, "--meta-batch")
    source = load_source(config).placed(mesh, config.devices.devices)
    print(header(config, source, devices.describe(mesh)), flush=True)
    if devices.is_one_of_several():
        print(how_to_go_on(folder), flush=True)  # a process may die
    with locked(folder, config, may_change(config)):
        try:
            if config.run.seeds == 1:
                run_seed(config, source, folder)
            else:
                run_seeds(config, source, folder)
        except Interrupted:
            print(f"stopped and saved; {how_to_go_on(folder)}")
            return 130
    return 0


def how_to_go_on(folder: Path) -> str:
    return f"to resume: python -m experiments.few_shot --resume {folder}"


def require_tensorboard() -> None:
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise ImportError(
            "--tensorboard needs tensorboardX: pip install 'metalstm[tensorboard]'"
        ) from None


if __name__ == "__main__":
    devices.exit_with(main)
