"""Train one's own model with several optimizers, on equal terms, in one call."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalstm.base import Array, PyTree
from metalstm.checks import check_at_least
from metalstm.learned_optimizers.curves import loss_curves
from metalstm.learned_optimizers.problems import ProblemFamily
from metalstm.plots import Losses, loss_panels
from metalstm.rules.pretrained import pretrained_optimizer

__all__ = ["Comparison", "compare_optimizers"]


@dataclass(frozen=True)
class Comparison:
    """Losses of the same runs by several optimizers; ``print`` it for a table.

    Attributes:
      steps: updates done at each recorded loss, int [R].
      losses: optimizer -> its losses, float32 [seeds, R].
      seconds: optimizer -> of all its runs, compilation included.
    """

    steps: np.ndarray
    losses: dict[str, np.ndarray]
    seconds: dict[str, float]

    @property
    def final(self) -> dict[str, np.ndarray]:
        """Each optimizer's last losses, [seeds]."""
        return {name: losses[:, -1] for name, losses in self.losses.items()}

    @property
    def diverged(self) -> dict[str, np.ndarray]:
        """Whether each run's last loss is no number, or above its first: [seeds]."""
        return {
            name: ~(losses[:, -1] <= losses[:, 0])  # NaN is not below
            for name, losses in self.losses.items()
        }

    def __str__(self) -> str:
        width = max(map(len, ("optimizer", *self.losses)))
        rows = [f"{'optimizer':{width}s}  median loss   lowest  highest  seconds"]
        for name, final in self.final.items():
            counted = np.where(np.isfinite(final), final, np.inf)
            low, middle, high = counted.min(), np.median(counted), counted.max()
            rows.append(
                f"{name:{width}s}  {middle:11.4g}  {low:7.4g}  {high:7.4g}"
                f"  {self.seconds[name]:7.1f}"
            )
            if count := int(self.diverged[name].sum()):
                rows[-1] += f"  {count} of {len(final)} diverged"
        return "\n".join(rows)

    def plot(self) -> Any:
        """Draw the losses as a matplotlib Figure; needs the extra ``experiments``."""
        return loss_panels(
            {"": {n: Losses(self.steps, x) for n, x in self.losses.items()}}
        )


def compare_optimizers(
    loss: Callable[[PyTree, PyTree], Array],
    params: PyTree | Callable[[Array], PyTree],
    data: PyTree,
    steps: int,
    *,
    optimizers: Mapping[str, str | optax.GradientTransformation],
    batch_size: int = 128,
    seeds: int = 3,
    records: int = 20,
    eval_batch: int = 1_024,
) -> Comparison:
    """Train a model with each of several optimizers, from the same starts.

    Run k draws the same minibatches, with replacement, for every optimizer::

        result = metalstm.compare_optimizers(
            loss, params, (images, labels), 1_000,
            optimizers={"adamw": optax.adamw(1e-3), "learned": "l2l-mnist"},
        )
        print(result)
        result.plot()

    Args:
      loss: (params, batch) -> scalar. A batch is like ``data``, with ``batch_size``
        rows. Of an NNX model, ``params`` are what `flax.nnx.split` gives.
      params: where all runs start; or a function of a key, and each run has its own.
      data: any pytree of arrays [M, ...].
      steps: updates of a run.
      optimizers: name -> an optax transform, or the name of a trained rule, which is
        told ``steps`` (see `metalstm.pretrained_optimizer`). A rate that should decay
        is a schedule of one's own, such as `optax.cosine_decay_schedule`.
      batch_size: rows of a minibatch.
      seeds: runs of each optimizer.
      records: equal times at which losses are recorded, besides the first.
      eval_batch: rows that a recorded loss is the mean over, the same for all.

    Warns:
      RuntimeWarning: once for each optimizer that has runs which diverge: whose last
        loss is not finite, or above the first.

    Raises:
      ValueError: no optimizer, a name of no rule, arrays of different lengths, or a
        number below 1.
    """
    if not optimizers:
        raise ValueError("optimizers={}: name at least one")
    numbers = {"steps": steps, "seeds": seeds, "records": records}
    numbers |= {"batch_size": batch_size, "eval_batch": eval_batch}
    for name, value in numbers.items():
        check_at_least(name, value, 1)
    transforms = {
        name: pretrained_optimizer(tx, num_steps=steps) if isinstance(tx, str) else tx
        for name, tx in optimizers.items()
    }
    # the number of records that divides the updates
    every = next(n for n in range(-(-steps // records), steps + 1) if steps % n == 0)
    family = _family(loss, params, data, batch_size)
    losses, seconds = {}, {}
    for name, tx in transforms.items():
        started = time.perf_counter()
        losses[name] = loss_curves(
            family,
            tx,
            data,
            num_instances=seeds,
            num_steps=steps,
            record_every=every,
            eval_batch=eval_batch,
        )
        seconds[name] = time.perf_counter() - started
    found = Comparison(np.arange(0, steps + 1, every), losses, seconds)
    for name, diverged in found.diverged.items():
        if diverged.any():
            _warn(name, losses[name], found.steps)
    return found


def _family(loss, params, data: PyTree, batch_size: int) -> ProblemFamily:
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"data has leading axes {sorted(lengths)}: give arrays of one length M, "
            "the examples"
        )
    ((num_rows,),) = lengths

    def batch(key: Array, data: PyTree, size: int | None = None) -> PyTree:
        rows = jax.random.randint(key, (size or batch_size,), 0, num_rows)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], data)

    return ProblemFamily(
        sample=lambda key, data: (),
        init=lambda key, task: params(key) if callable(params) else params,
        batch=batch,
        loss=lambda params, task, batch: loss(params, batch),
    )


def _warn(name: str, losses: np.ndarray, steps: np.ndarray) -> None:
    worse = ~(losses <= losses[:, :1])
    bad = worse[:, -1]
    first = int(steps[worse[bad].argmax(1).min()])
    warnings.warn(
        f"{name} diverged in {bad.sum()} of {len(bad)} runs: the loss was above its "
        f"first, or no number, from update {first} or earlier; clip gradients, scale "
        "the updates down, or use pretrained_optimizer(..., fallback=True)",
        RuntimeWarning,
        stacklevel=3,
    )
