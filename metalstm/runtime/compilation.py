"""`jax.jit` with the compiler's options that are fastest where the program runs.

On a CPU, XLA gives convolutions and matrix products to YNNPACK. It computes a
convolution on one core however many there are, and long products on several cores at
two thirds of the speed of XLA's own. So where a device has several cores YNNPACK
computes sums alone, at which it is the faster one (docs/performance.md has the gains).
With one device for each core, or on one core, nothing is changed: there YNNPACK is as
fast or faster.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["Jitted", "compiler_options", "cores", "cores_to_spare"]

_ONLY_SUMS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


class Jitted:
    """``jax.jit(fn, **options)``, compiled with `compiler_options`.

    Where it is called within another jitted function, that one's options hold. An array
    that appears twice in the arguments (a state built by hand) may be donated.
    """

    def __init__(self, fn: Callable, **options: Any):
        functools.update_wrapper(self, fn)
        self._fn, self._options = fn, options
        self._nested = jax.jit(fn, **options)

    @functools.cached_property
    def _outermost(self) -> Any:
        # not before the first call: it starts JAX's backend
        return jax.jit(
            self._fn, compiler_options=compiler_options() or None, **self._options
        )

    def __call__(self, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self._nested(*args)
        if "donate_argnums" in self._options and len({*map(id, leaves)}) < len(leaves):
            args = jax.tree.unflatten(structure, _without_repeats(leaves))
        return self._outermost(*args)

    def lower(self, *args: Any) -> Any:
        """As the method of a `jax.jit` function."""
        return self._outermost.lower(*args)

    def _cache_size(self) -> int:
        """How many programs it holds, as the method of a `jax.jit` function."""
        return self._outermost._cache_size()


def _without_repeats(leaves: list[Any]) -> list[Any]:
    """Copies in place of what came before: no buffer can be donated twice."""
    seen: set[int] = set()
    unique = []
    for leaf in leaves:
        again = id(leaf) in seen and isinstance(leaf, jax.Array)
        unique.append(leaf.copy() if again else leaf)
        seen.add(id(leaf))
    return unique


@functools.cache
def compiler_options() -> dict[str, str]:
    """What `Jitted` gives to ``jax.jit(compiler_options=)`` in this process."""
    if not cores_to_spare():
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_ONLY_SUMS)()
    except Exception:  # a jaxlib that does not know the option
        return {}
    return _ONLY_SUMS


def cores_to_spare() -> bool:
    """Whether a device is a CPU with several cores of its own."""
    return jax.default_backend() == "cpu" and jax.local_device_count() < cores()


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
