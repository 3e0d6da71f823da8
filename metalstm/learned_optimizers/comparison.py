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
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from metalstm.base import Array, PyTree
from metalstm.checks import check_count
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
        return {name: _rose(losses)[:, -1] for name, losses in self.losses.items()}

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
        """Draw the means as a matplotlib Figure; needs the extra ``experiments``."""
        drawn = {n: Losses(self.steps, x) for n, x in self.losses.items()}
        return loss_panels({"": drawn}, ylabel="loss, mean over seeds", over="seeds")


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
        told ``steps``; a transform is not (``pretrained_optimizer(name,
        num_steps=steps)`` is). A rate that should decay is a schedule of one's own,
        such as `optax.cosine_decay_schedule`. Schedule-free optimizers are measured at
        `optax.contrib.schedule_free_eval_params`.
      batch_size: rows of a minibatch.
      seeds: runs of each optimizer.
      records: about equal times at which losses are recorded, besides the first.
      eval_batch: rows that every recorded loss is measured on, the same for all runs
        and times: all M, or as many of them as this, drawn once.

    Warns:
      RuntimeWarning: once for each optimizer that has runs which diverge: whose last
        loss is not finite, or above the first.

    Raises:
      ValueError: before any run: no optimizer, or what is none; a name of no rule; a
        loss that is no scalar; arrays of different lengths; a number that is no
        integer, or below 1.
    """
    numbers = {"steps": steps, "seeds": seeds, "records": records}
    numbers |= {"batch_size": batch_size, "eval_batch": eval_batch}
    for name, value in numbers.items():
        check_count(name, value)
    transforms = _transforms(optimizers, steps)
    family = _family(loss, params, data, batch_size, eval_batch)
    _check_first_update(family, transforms, data)
    # one that divides the updates, if there is one near: a shorter last part compiles
    # the update again
    least = -(-steps // records)
    near = range(least, least + least // 2 + 1)
    every = next((n for n in near if steps % n == 0), least)
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
            measured=_evaluated,
        )
        seconds[name] = time.perf_counter() - started
    times = np.minimum(np.arange(0, steps + every, every), steps)
    found = Comparison(times, losses, seconds)
    for name, diverged in found.diverged.items():
        if diverged.any():
            _warn(name, losses[name], found.steps)
    return found


def _transforms(
    optimizers: Mapping[str, Any], steps: int
) -> dict[str, optax.GradientTransformation]:
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise ValueError(
            f"optimizers={optimizers!r:.200}: name at least one, in a dict such as "
            '{"adamw": optax.adamw(1e-3)}'
        )
    found = {}
    for name, tx in optimizers.items():
        if isinstance(tx, str):
            tx = pretrained_optimizer(tx, num_steps=steps)
        if not isinstance(tx, optax.GradientTransformation):
            raise ValueError(
                f"optimizers[{name!r}]={tx!r:.200}: give an optax transform, such as "
                "optax.adamw(1e-3) or rule.bind(its parameters), or a trained rule's "
                "name"
            )
        found[str(name)] = tx
    return found


def _check_first_update(
    family: ProblemFamily,
    transforms: Mapping[str, optax.GradientTransformation],
    data: PyTree,
) -> None:
    """Trace one update by each optimizer: an error is to cost no finished run."""
    key = jax.random.key(0)
    start = jax.eval_shape(family.init, key, ())
    batch = jax.eval_shape(family.batch, key, data)
    loss = jax.eval_shape(family.loss, start, (), batch)
    kind = getattr(loss, "dtype", None)
    if kind is None or loss.shape or not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(
            f"loss(params, batch) returned {loss!r:.200}: let it return one number, a "
            "float, without side outputs"
        )
    grads = jax.eval_shape(jax.grad(family.loss), start, (), batch)
    for name, tx in transforms.items():
        tx = optax.with_extra_args_support(tx)

        def update(grads, params, value):
            return tx.update(grads, tx.init(params), params, value=value)[0]  # noqa: B023

        try:
            jax.eval_shape(update, grads, start, loss)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"optimizers[{name!r}] makes no update of these parameters from "
                f"update(grads, state, params, value=loss): {error}"
            ) from error


def _family(
    loss, params, data: PyTree, batch_size: int, eval_batch: int
) -> ProblemFamily:
    leaves = jax.tree.leaves(data)
    lengths = {np.shape(leaf)[:1] for leaf in leaves}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves}))
        raise ValueError(
            f"data has leading axes {sorted(lengths)} of {kinds or 'nothing'}: give "
            "arrays of one length M, 1 or more, the examples"
        )
    ((num_rows,),) = lengths
    # all losses of the same rows, or their noise would pass for divergence
    measured = np.random.default_rng(0).permutation(num_rows)[:eval_batch]

    def batch(key: Array, data: PyTree, size: int | None = None) -> PyTree:
        drawn = jax.random.randint(key, (batch_size,), 0, num_rows)
        rows = drawn if size is None else measured
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], data)

    return ProblemFamily(
        sample=lambda key, data: (),
        init=lambda key, task: params(key) if callable(params) else params,
        batch=batch,
        loss=lambda params, task, batch: _as_array(loss(params, batch)),
    )


def _evaluated(state: PyTree, params: PyTree) -> PyTree:
    """The parameters to measure; a schedule-free optimizer has others than it moves."""
    is_free = lambda part: isinstance(part, ScheduleFreeState)  # noqa: E731
    states = filter(is_free, jax.tree.leaves(state, is_leaf=is_free))
    found = next(states, None)
    return params if found is None else schedule_free_eval_params(found, params)


def _as_array(loss: Any) -> Any:
    """A loss that is a Python number as an array; anything else as it is."""
    return jnp.asarray(loss) if isinstance(loss, float | int) else loss


def _rose(losses: np.ndarray) -> np.ndarray:
    """Where losses [seeds, R] are no numbers, or above the first but for rounding."""
    first = losses[:, :1]
    return ~(np.isfinite(losses) & (losses <= first + 1e-5 * np.abs(first)))


def _warn(name: str, losses: np.ndarray, steps: np.ndarray) -> None:
    worse = _rose(losses)
    bad = worse[:, -1]
    first = int(steps[worse[bad].argmax(1).min()])
    warnings.warn(
        f"{name} diverged in {bad.sum()} of {len(bad)} runs: the loss was above its "
        f"first, or no number, from update {first} or earlier; clip gradients, scale "
        "the updates down, or put metalstm.rules.with_fallback around it",
        RuntimeWarning,
        stacklevel=3,
    )
