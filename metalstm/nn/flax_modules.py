"""Learners made of flax modules: pure functions over pure arrays.

A learner may be used in a `lax.scan` carry, under `vmap`, `grad` and `jit`. Randomness
comes from the ``key`` of a pass alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from flax import linen as nn

from metalstm.base import Learner
from metalstm.checks import check_choice
from metalstm.nn.linen import from_linen
from metalstm.nn.nnx import from_nnx
from metalstm.nn.signatures import parameters_of

if TYPE_CHECKING:  # a quarter of the time of `import metalstm`, for its users alone
    from flax import nnx

__all__ = ["from_flax"]


def from_flax(
    module: nn.Module | Callable[..., nnx.Module],
    *,
    wrt: Any = None,
    layers: Literal["fastest", "flax"] = "fastest",
) -> Learner:
    """Make a learner of a Linen module, an NNX class or a function that makes one.

    ``__call__`` takes x [N, ...] and, where it has them, ``train``, ``training``,
    ``is_training`` or ``use_running_average``, which say whether a batch norm uses its
    batch, and ``deterministic``, whether dropout is off. Where it takes several inputs,
    such as token ids and a mask, x is a tuple of them, or a dict with their names.

    Linen: a module with a batch norm must take one of the switches. The key of a pass
    alone switches `nn.Dropout`, not the module's flag; other random layers ask
    ``self.has_rng("dropout")``.

    >>> learner = from_flax(nn.Dense(5))

    NNX: the class or function is called with ``rngs``. Every layer's
    ``use_running_average`` and ``deterministic`` are set, as ``module.train()`` and
    ``module.eval()`` do; without a key dropout is off whatever the module says. NNX's
    batch norm stops gradients at its averages (flax 0.12): where a query is normalised
    by the support set's, they are constants to a second-order meta-gradient. Linen's
    are not.

    >>> import functools
    >>> from flax import nnx
    >>> learner = from_flax(functools.partial(nnx.Linear, 8, 5))
    >>> learner = from_flax(lambda rngs: nnx.Linear(8, 5, rngs=rngs))

    ``stats`` is Linen's collection "batch_stats" or NNX's `BatchStat` variables, and
    ``other`` is every further variable except generators.

    Args:
      module: as above.
      wrt: which parameters are ``params``: an nnx filter, such as ``nnx.LoRAParam``,
        ``nnx.PathContains("head")`` or a function of (path, parameter). The others are
        ``other``: neither adapted nor learned. To learn them without adapting them, see
        `metalstm.rules.only`.
      layers: "fastest" computes the convolutions of `nn.Conv` and `nnx.Conv` and flax's
        `max_pool` in the form that is fastest where they run, 2 to 20 times faster
        than flax's in an inner loop on a CPU, and equal up to rounding. A layer that
        was given its own ``conv_general_dilated`` keeps it. "flax" leaves all of them.

    Raises:
      ValueError: for an NNX instance, an NNX class that needs more than ``rngs``, a
        Linen class; when initialised, for a Linen module with batch statistics and
        no switch for them, a ``wrt`` that selects nothing, or an x whose parts are not
        the inputs.
    """
    check_choice("layers", layers, ("fastest", "flax"))
    fastest = layers == "fastest"
    if isinstance(module, nn.Module):
        return from_linen(module, wrt=wrt, fast=fastest)
    if _is_nnx_instance(module):
        name = type(module).__name__
        raise ValueError(
            f"from_flax got an instance of the NNX module {name}: its parameters are "
            "already drawn, so it cannot be initialised again from another key. "
            "Pass the function that makes it: "
            f"from_flax(lambda rngs: {name}(..., rngs=rngs))"
        )
    linen_class = isinstance(module, type) and issubclass(module, nn.Module)
    if linen_class or not callable(module):
        raise ValueError(
            f"from_flax got {module!r}: pass a Linen module (an instance), an NNX "
            "class or a function of rngs that makes an NNX module: "
            "from_flax(lambda rngs: Net(rngs=rngs))"
        )
    if isinstance(module, type) and (missing := _required_arguments(module)):
        name = module.__name__
        raise ValueError(
            f"from_flax got the class {name}, which needs {', '.join(missing)} too: "
            f"from_flax(functools.partial({name}, {missing[0]}=...))"
        )
    return from_nnx(module, wrt=wrt, fast=fastest)


def _is_nnx_instance(module: object) -> bool:
    loaded = sys.modules.get("flax.nnx")  # whoever has a module imported it
    return loaded is not None and isinstance(module, loaded.Module)


def _required_arguments(make: type) -> list[str]:
    """The arguments of a class, but for ``rngs``, that have no default."""
    required = [
        name
        for name, parameter in parameters_of(make).items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return [name for name in required if name != "rngs"]
