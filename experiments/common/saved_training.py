"""A meta-training on disk: its newest states, and its best meta-parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

import metalstm
from experiments.common.saved_options import to_json
from metalstm.meta.fitting import FitState
from metalstm.meta.step import TrainState
from metalstm.runtime import checkpoints, processes


class Resumed(NamedTuple):
    state: FitState
    history: list[dict[str, float]]  # a row for each validation
    seconds: float  # of all sessions before


class SavedTraining:
    """``folder/state`` has the newest two states, ``folder/best`` the best parameters.

    Args:
      config: what a state must have been saved with, but for ``may_change``.
    """

    def __init__(self, folder: Path, config: Any, may_change: Iterable[str]):
        self.folder, self.config = folder, to_json(config)
        self.may_change = tuple(may_change)
        self.best_step: int | None = None  # of what best/ holds

    def restore(self, make: Callable[[], TrainState]) -> Resumed | None:
        """Read the newest state, and write the best again should it be damaged.

        Raises:
          ConfigMismatch: it was saved with another config.
        """
        # process 0 decides: shared storage may show another a folder late
        found = json.dumps(checkpoints.latest(self.folder / "state"))
        if json.loads(processes.from_main(found)) is None:
            return None
        restored = checkpoints.restore(
            self.folder / "state",
            jax.eval_shape(lambda: metalstm.init_fit_state(make())),
            config=self.config,
            ignore=self.may_change,
        )
        if restored.message:
            print(f"note: {restored.message}")
        if _is_validated(restored.state):
            self._save_best(restored.state)  # it may be damaged
        metadata = restored.metadata
        return Resumed(restored.state, metadata["history"], metadata["seconds"])

    def save(
        self, state: FitState, history: list[dict[str, float]], seconds: float
    ) -> None:
        if _is_validated(state) and int(state.best_step) != self.best_step:
            self._save_best(state)
        checkpoints.save(
            self.folder / "state",
            state,
            step=int(state.train.step),
            metadata={"config": self.config, "history": history, "seconds": seconds},
        )

    def seconds(self) -> float:
        """Of meta-training and validation, over all sessions."""
        return checkpoints.read_metadata(self.folder / "state")["seconds"]

    def _save_best(self, state: FitState) -> None:
        self.best_step = int(state.best_step)
        checkpoints.save(
            self.folder / "best",
            state.best_params,
            step=self.best_step,
            metadata={"validation": float(state.best_score)},
            keep=1,
        )


def _is_validated(state: FitState) -> bool:
    return math.isfinite(float(state.best_score))
