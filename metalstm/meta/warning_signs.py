"""Signs that meta-training goes wrong, each said once, with what to try."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping

import numpy as np

__all__ = ["WarningSigns"]

_WINDOW = 50  # meta-steps whose mean is looked at
_BUDGET = 200  # meta-steps after which something should have been learned

# metric: a share of tasks, which half of them must not reach; what that means
_SHARES = {
    "diverged": (
        "in {share:.0%} of the tasks the learned optimizer diverges (losses that "
        "explode or are not finite): clip its updates with rules.chain(rule, "
        "optax.clip(..)), give it a smaller output_scale, or shorten the horizon"
    ),
    "above_start": (
        "in {share:.0%} of the tasks the loss that the learned optimizer reaches is "
        "above the one that it started from: lower the meta-learning rate or the "
        "rule's output_scale, or shorten the horizon"
    ),
    "support_loss_rose": (
        "in {share:.0%} of the tasks the inner loop diverges (the loss on the support "
        "set is higher before the last update than before the first): lower the step "
        "size, or choose gradient_scale='calibrated', which fits it to the data"
    ),
}


class WarningSigns:
    """Looks at the metrics of meta-steps, and warns with a RuntimeWarning."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, deque[float]] = {}
        self._num_steps = 0

    def look(self, metrics: Mapping[str, np.ndarray], step: int) -> None:
        """Take the metrics [steps] of the meta-steps up to ``step``."""
        for name, values in metrics.items():
            first = self._first.setdefault(name, [])
            first.extend(values[: _WINDOW - len(first)].tolist())
            self._last.setdefault(name, deque(maxlen=_WINDOW)).extend(values.tolist())
        self._num_steps += len(next(iter(metrics.values()), ()))
        for name, text in _SHARES.items():
            recent = self._last.get(name, ())
            if len(recent) == _WINDOW and np.mean(recent) > 0.5:
                self._say(name, f"step {step}: {text.format(share=np.mean(recent))}")

    def look_at_end(self) -> None:
        """Compare the last meta-steps with the first, when the budget is spent."""
        if self._num_steps < _BUDGET or "accuracy" not in self._last:
            return
        first, last = self._first["accuracy"], np.array(self._last["accuracy"])
        # regression has minus its error for an accuracy
        if last.min() < 0 or last.mean() > 0.6:
            return
        before, after = np.mean(first), last.mean()
        noise = 2 * np.sqrt((np.var(first) + last.var()) / _WINDOW)
        fell = np.mean(self._last["loss"]) < 0.99 * np.mean(self._first["loss"])
        if after - before <= noise and not fell:
            self._say(
                "nothing learned",
                f"after {self._num_steps} meta-steps the accuracy is where it began "
                f"({before:.1%} at first, {after:.1%} at the end): try another inner "
                "step size (algorithms.meta_lstm without a rule fits it to the data), "
                "more meta-steps, a higher meta-learning rate, or look at whether "
                "labels and images belong together",
            )

    def _say(self, sign: str, text: str) -> None:
        if sign not in self._said:
            self._said.add(sign)
            warnings.warn(text, RuntimeWarning, stacklevel=2)
