"""What a program is traced and compiled for: the platform, and the compiler's options.

Several operations have a form for CPUs and one for accelerators. `platform` says which
one is traced: that of JAX's default device, or of another within `traced_for`.

On a CPU, XLA gives convolutions and matrix products to YNNPACK. It computes a
convolution on one core however many there are, and long products on several cores at
two thirds of the speed of XLA's own. So where a device has several cores YNNPACK
computes sums alone, at which it is the faster one (docs/performance.md has the gains).
With one device for each core, or on one core, nothing is changed: there YNNPACK is as
fast or faster.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax

from metalstm.checks import check_choice

__all__ = [
    "Jitted",
    "Platform",
    "compiler_options",
    "cores",
    "cores_to_spare",
    "platform",
    "traced_for",
]

Platform = Literal["cpu", "gpu", "tpu"]

# part of the keys of JAX's caches: what was traced for one platform serves no other
_traced_for = jax.make_user_context(None)

_ONLY_SUMS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def platform() -> str:
    """Return what programs are traced for: "cpu", "gpu" or "tpu"."""
    return _traced_for.value or jax.default_backend()


@contextlib.contextmanager
def traced_for(name: Platform) -> Iterator[None]:
    """Trace the forms of a platform within, wherever this runs; to export or compile.

    Raises:
      ValueError: it is no `Platform`.
    """
    check_choice("platform", name, get_args(Platform))
    with _traced_for(name):
        yield


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
        options = {**self._options, "compiler_options": compiler_options() or None}
        return jax.jit(self._fn, **options).lower(*args)

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


def compiler_options() -> dict[str, str]:
    """What `Jitted` gives to ``jax.jit(compiler_options=)`` in this process."""
    return _known_options() if cores_to_spare() else {}


@functools.cache
def _known_options() -> dict[str, str]:
    try:
        jax.jit(lambda: 0, compiler_options=_ONLY_SUMS)()
    except Exception:  # a jaxlib that does not know the option
        return {}
    return _ONLY_SUMS


def cores_to_spare() -> bool:
    """Whether a device is a CPU with several cores of its own."""
    return platform() == "cpu" and jax.local_device_count() < cores()


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
