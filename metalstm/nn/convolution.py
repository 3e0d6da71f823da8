"""Two-dimensional convolution in the form that is fast where it runs.

Shapes: T tasks, N images, H rows, W columns, C input channels, O output channels.

On a GPU or TPU it is `lax.conv_general_dilated`. XLA's CPU backend runs the
convolution itself at the speed of a matrix product (jaxlib 0.10; on all cores only with
the options of `runtime.compilation`), but its derivative by the kernel a hundred times
slower inside a loop, and a kernel per task (a grouped convolution) slowest of all.
On that backend it is many times faster to compute one task at a time, and the kernel's
derivative as a matrix product of a few shifted images, which stay in the cache
(benchmarks/convolutions.py). Two primitives hold this, since JAX has no other way to
define how an operation is differentiated in both modes *and* batched:

  correlate(x, k)   y[i, j] = sum_ab x[i + a, j + b] k[a, b]      [T, N, H, W, O]
  outer(x, g)       k[a, b] = sum_ij x[i + a, j + b]^T g[i, j]    [T, 3, 3, C, O]

Both are bilinear, and their transposes are each other: correlating the cotangent with
the flipped kernel, or its outer product with the images. So derivatives of any order
and mode close over the pair, and batching is a matter of the axis T.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from metalstm.base import Array
from metalstm.checks import check_choice
from metalstm.runtime.compilation import Platform, cores_to_spare, platform

__all__ = ["Method", "conv2d", "default_method"]

Method = Literal["xla", "slices", "blocked"]

# How much a block of images may occupy with its shifts next to each other: what stays
# in the cache of one core; with `cores_to_spare`, enough for several.
_BLOCK_BYTES = {False: 2**20, True: 2**22}
# Up to this many channels all nine shifts are laid out; beyond it only the three along
# a row, for the inner size of the matrix product would be too short.
_FEW_CHANNELS = 8


def conv2d(
    x: Array,
    kernel: Array,
    *,
    strides: int = 1,
    padding: Literal["SAME", "VALID"] = "SAME",
    method: Method | None = None,
) -> Array:
    """Convolve images with a kernel, as `lax.conv_general_dilated` does.

    Args:
      x: [N, H, W, C].
      kernel: [rows, columns, C, O].
      strides: of both image axes.
      padding: "SAME" or "VALID".
      method: "xla" is `lax.conv_general_dilated`; "slices" is one matrix product of the
        shifted images, for any kernel and stride; "blocked" is "xla" with the kernel's
        derivative as a matrix product of a few images at a time, for 3x3 kernels,
        stride 1 and padding "SAME". None asks `default_method`.

    Returns:
      [N, H', W', O].

    Raises:
      ValueError: for shapes that do not fit, an unknown method or padding, or "blocked"
        where it does not apply.
    """
    _check(x, kernel, strides, padding)
    if method is None:
        method = default_method(kernel.shape, strides=strides, padding=padding)
    if method == "xla":
        return lax.conv_general_dilated(
            x,
            kernel,
            (strides, strides),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    if method == "slices":
        return _slices(x, kernel, strides, padding)
    check_choice("method", method, get_args(Method))
    if not _blockable(kernel.shape, strides, padding):
        raise ValueError(
            f"method='blocked' is for 3x3 kernels, strides=1 and padding='SAME', not "
            f"{kernel.shape[:2]}, strides={strides}, padding={padding!r}; use 'slices'"
        )
    dtype = jnp.result_type(x, kernel)
    x, kernel = _same_varying(x.astype(dtype), kernel.astype(dtype))
    return _correlate_p.bind(x[None], kernel[None])[0]


def default_method(
    kernel_shape: tuple[int, ...],
    *,
    strides: int = 1,
    padding: str = "SAME",
    backend: Platform | None = None,
) -> Method:
    """Return the method that was fastest in benchmarks/convolutions.py."""
    if (backend or platform()) != "cpu":
        return "xla"
    return "blocked" if _blockable(kernel_shape, strides, padding) else "slices"


def _blockable(kernel_shape: tuple[int, ...], strides: int, padding: str) -> bool:
    return kernel_shape[:2] == (3, 3) and strides == 1 and padding == "SAME"


def _slices(x: Array, kernel: Array, strides: int, padding: str) -> Array:
    rows, columns, channels, filters = kernel.shape
    images, height, width, _ = x.shape
    window, steps = (rows, columns), (strides, strides)
    pads = lax.padtype_to_pads((height, width), window, steps, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = (
        (size - span) // strides + 1
        for size, span in zip(x.shape[1:3], window, strict=True)
    )
    shifted = [
        lax.slice(
            x,
            (0, i, j, 0),
            (
                images,
                i + (height - 1) * strides + 1,
                j + (width - 1) * strides + 1,
                channels,
            ),
            (1, strides, strides, 1),
        )
        for i in range(rows)
        for j in range(columns)
    ]
    # a product of matrices: XLA copies an operand of more axes to transpose it
    pixels = jnp.concatenate(shifted, -1).reshape(images * height * width, -1)
    product = pixels @ kernel.reshape(-1, filters)
    return product.reshape(images, height, width, filters)


# The kernel's derivative, in plain JAX, for some images of one task.


def _outer_images(x: Array, g: Array) -> Array:
    """x [n, H, W, C], g [n, H, W, O] -> [3, 3, C, O]."""
    channels, filters = x.shape[-1], g.shape[-1]
    if channels <= _FEW_CHANNELS:
        product = _shifts(x, rows=True) @ g.reshape(-1, filters)
        return product.reshape(3, 3, channels, filters)
    height = g.shape[1]
    padded = jnp.pad(g, ((0, 0), (2, 2), (0, 0), (0, 0)))
    shifted = [padded[:, 2 - i : height + 4 - i] for i in range(3)]
    g = jnp.concatenate(shifted, -1).reshape(-1, 3 * filters)
    product = (_shifts(x, rows=False) @ g).reshape(3, channels, 3, filters)
    return product.transpose(2, 0, 1, 3)


def _shifts(x: Array, *, rows: bool) -> Array:
    """[n, H, W, C] -> [9 C, n H W], every pixel's 3 x 3 neighbours; without the shifts
    along ``rows`` [3 C, n (H + 2) W], its left and right ones.

    Planes are shifted, so that a row of pixels is one copy.
    """
    _, height, width, channels = x.shape
    planes = jnp.pad(x.transpose(3, 0, 1, 2), ((0, 0), (0, 0), (1, 1), (1, 1)))
    tops, kept = (range(3), height) if rows else (range(1), height + 2)
    shifted = [
        planes[:, :, i : i + kept, j : j + width] for i in tops for j in range(3)
    ]
    return jnp.concatenate(shifted).reshape(len(shifted) * channels, -1)


# The two bilinear maps, for all images of all tasks.


def _correlate(x: Array, kernel: Array) -> Array:
    """x [T, N, H, W, C], kernel [T, 3, 3, C, O] -> [T, N, H, W, O]."""

    channels = x.shape[-1]
    if channels <= _FEW_CHANNELS and cores_to_spare():
        # 1.4 to 3.7 times faster there, where the images are those of the step before;
        # slower on one core
        by_product = functools.partial(_slices, strides=1, padding="SAME")
        return _each_task(by_product, x, kernel)
    if channels > 2 and channels % 4:  # colours: vectors of four run 1.8 times faster
        pads = [(0, 0)] * (x.ndim - 1) + [(0, -channels % 4)]
        x, kernel = jnp.pad(x, pads), jnp.pad(kernel, [*pads[:3], pads[-1], (0, 0)])
    one_task = functools.partial(conv2d, method="xla")
    return _each_task(one_task, x, kernel)


def _outer(x: Array, g: Array) -> Array:
    """x [T, N, H, W, C], g [T, N, H, W, O] -> [T, 3, 3, C, O]."""

    def one_task(x, g):
        blocks = (_blocks(x, x), _blocks(g, x))
        # Starting from the first product rather than from zeros keeps the carry's
        # type right inside a shard_map.
        first = _outer_images(blocks[0][0], blocks[1][0])
        if blocks[0].shape[0] == 1:
            return first
        rest = jax.tree.map(lambda leaf: leaf[1:], blocks)
        step = lambda total, block: (total + _outer_images(*block), None)  # noqa: E731
        return lax.scan(step, first, rest)[0]

    return _each_task(one_task, x, g)


def _each_task(fn: Callable, *args: Array) -> Array:
    if args[0].shape[0] == 1:
        return fn(*(arg[0] for arg in args))[None]
    return lax.map(lambda task: fn(*task), args)


def _blocks(x: Array, images_of: Array) -> Array:
    """[N, ...] -> [blocks, n, ...], n the largest divisor of N for which
    the shifts of ``images_of`` [N, H, W, C] fit the cache."""
    images, height, width, channels = images_of.shape
    shifts = 9 if channels <= _FEW_CHANNELS else 3
    image_bytes = shifts * (height + 2) * width * channels * images_of.dtype.itemsize
    block_bytes = _BLOCK_BYTES[cores_to_spare()]
    fitting = max(1, min(images, block_bytes // max(image_bytes, 1)))
    size = max(n for n in range(1, fitting + 1) if images % n == 0)
    return x.reshape(images // size, size, *x.shape[1:])


def _flip(kernel: Array) -> Array:
    """Return the kernel to correlate the cotangent with, [T, 3, 3, O, C]."""
    return kernel[:, ::-1, ::-1].swapaxes(-1, -2)


def _same_varying(*args: Array) -> tuple[Array, ...]:
    """Mark every array as varying over the mesh axes that any of them varies over."""

    def axes(x):
        aval = jax.typeof(x)
        kind = getattr(aval, "manual_axis_type", None)  # jax < 0.10 calls it vma
        return kind.varying if kind is not None else getattr(aval, "vma", frozenset())

    everywhere = frozenset().union(*map(axes, args))
    missing = (tuple(everywhere - axes(arg)) for arg in args)
    return tuple(
        lax.pcast(arg, names, to="varying") if names else arg
        for arg, names in zip(args, missing, strict=True)
    )


def _make_primitive(name: str, fn: Callable, output_shape: Callable) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(fn))

    def abstract_eval(a, b):
        shape = output_shape(a.shape, b.shape)
        spec = PartitionSpec(*[None] * len(shape))
        return a.update(shape=shape, sharding=NamedSharding(a.sharding.mesh, spec))

    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, mlir.lower_fun(fn, multiple_results=False))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    return primitive


def _batch(primitive, args, axes):
    """Make a batched operand more tasks; repeat one that is not batched."""
    size = next(
        a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None
    )

    def more_tasks(arg, axis):
        if axis is None:
            arg = jnp.broadcast_to(arg, (size, *arg.shape))
        else:
            arg = jnp.moveaxis(arg, axis, 0)
        return arg.reshape(size * arg.shape[1], *arg.shape[2:])

    out = primitive.bind(*_same_varying(*map(more_tasks, args, axes)))
    return out.reshape(size, -1, *out.shape[1:]), 0


_correlate_p = _make_primitive(
    "blocked_correlate", _correlate, lambda x, k: (*x[:-1], k[-1])
)
_outer_p = _make_primitive(
    "blocked_outer", _outer, lambda x, g: (x[0], 3, 3, x[-1], g[-1])
)
ad.defbilinear(
    _correlate_p,
    lambda ct, x, kernel: _correlate_p.bind(ct, _flip(kernel)),
    lambda ct, x, kernel: _outer_p.bind(x, ct),
)
ad.defbilinear(
    _outer_p,
    lambda ct, x, g: _correlate_p.bind(g, _flip(ct)),
    lambda ct, x, g: _correlate_p.bind(x, ct),
)


def _check(x: Array, kernel: Array, strides: int, padding: str) -> None:
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[-1] != kernel.shape[-2]:
        raise ValueError(
            f"x has shape {x.shape} and kernel {kernel.shape}: expected [N, H, W, C] "
            "and [rows, columns, C, O] with the same C"
        )
    if padding not in ("SAME", "VALID") or strides < 1:
        raise ValueError(
            f"padding={padding!r}, strides={strides}: padding is 'SAME' or 'VALID' and "
            "strides a positive int"
        )
