"""Every form of convolution against `lax.conv`, every derivative and batching."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from metalstm.nn import convolution
from metalstm.nn.convolution import conv2d, default_method


def reference(x, kernel, *, strides=1, padding="SAME"):
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def draw(channels=2, filters=3, size=(5, 7), kernel=(3, 3), images=2, dtype=np.float64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(images, *size, channels)).astype(dtype)
    scale = (kernel[0] * kernel[1] * channels) ** -0.5
    kernel = rng.normal(size=(*kernel, channels, filters)) * scale
    return x, kernel.astype(dtype)


def energy(conv, x, kernel):
    """A loss whose derivatives of every order depend on both arguments."""
    return jnp.sum(jnp.sin(conv(x, kernel)) * (1 + jnp.cos(x).mean()))


def step(conv, x, kernel):
    """A loss after one inner gradient step, as second-order MAML has it."""
    moved = kernel - 0.1 * jax.grad(energy, 2)(conv, x, kernel)
    return energy(conv, x + 1, moved)


def derivatives(conv, x, kernel):
    """Every combination that the library uses, or a user might."""
    direction = jnp.cos(kernel)
    both = functools.partial(jax.grad(energy, (1, 2)), conv)
    return {
        "value": conv(x, kernel),
        "gradient": both(x, kernel),
        "grad of grad": jax.grad(step, (1, 2))(conv, x, kernel),
        "jvp of grad": jax.jvp(both, (x, kernel), (jnp.sin(x), direction))[1],
        "grad of jvp": jax.grad(
            lambda k: jax.jvp(lambda x: energy(conv, x, k), (x,), (jnp.sin(x),))[1]
        )(kernel),
    }


def assert_same(ours, theirs, tolerance):
    def close(path, a, b):
        scale = np.abs(b).max()
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * scale, err_msg=str(path)
        )

    jax.tree.map_with_path(close, ours, theirs)


# nine shifts, three shifts; cores to spare change the form of few channels alone
@pytest.mark.parametrize(("channels", "spare"), [(2, False), (2, True), (9, False)])
@pytest.mark.parametrize("batching", ["one", "per task", "shared kernel", "shared x"])
def test_blocked_has_every_derivative_of_lax_conv(
    channels, batching, spare, monkeypatch
):
    one_image = dict.fromkeys((False, True), 1)  # so there are several blocks
    monkeypatch.setattr(convolution, "_BLOCK_BYTES", one_image)
    monkeypatch.setattr(convolution, "cores_to_spare", lambda: spare)
    axes = {"per task": (0, 0), "shared kernel": (0, None), "shared x": (None, 0)}

    def everything(conv, x, kernel):
        fn = functools.partial(derivatives, conv)
        if batching == "one":
            return fn(x, kernel)
        tasks = [
            jnp.stack([a, a * 1.5 - 0.2]) if axis == 0 else a
            for a, axis in zip((x, kernel), axes[batching], strict=True)
        ]
        return jax.vmap(fn, axes[batching])(*tasks)

    with jax.enable_x64(True):
        x, kernel = draw(channels)
        run = jax.jit(everything, static_argnums=0)
        ours = run(functools.partial(conv2d, method="blocked"), x, kernel)
        theirs = run(reference, x, kernel)
    assert_same(ours, theirs, 1e-10)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("size", [(5, 7), (6, 4), (3, 3)])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 3)])
def test_slices_match_lax_conv(kernel, size, strides, padding):
    with jax.enable_x64(True):
        x, k = draw(size=size, kernel=kernel)
        options = {"strides": strides, "padding": padding}
        ours = jax.jit(functools.partial(conv2d, method="slices", **options))(x, k)
        assert_same(ours, reference(x, k, **options), 1e-12)


def test_slices_with_stride_have_second_derivatives():
    with jax.enable_x64(True):
        x, kernel = draw()
        ours = functools.partial(conv2d, method="slices", strides=2)
        theirs = functools.partial(reference, strides=2)
        gradient = jax.jit(jax.grad(step, (1, 2)), static_argnums=0)
        assert_same(gradient(ours, x, kernel), gradient(theirs, x, kernel), 1e-11)


@pytest.mark.parametrize("method", ["xla", "slices", "blocked", None])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (10, 10), (21, 5)])
@pytest.mark.parametrize("channels", [1, 16])
def test_float32_agrees_with_float64(method, shape, channels):
    x, kernel = draw(channels, 4, shape, images=6, dtype=np.float32)
    with jax.enable_x64(True):
        exact = reference(x.astype(np.float64), kernel.astype(np.float64))
    ours = jax.jit(functools.partial(conv2d, method=method))(x, kernel)
    assert ours.dtype == jnp.float32
    assert_same(ours, exact, 1e-5)


@pytest.mark.parametrize("limit", [1, 5_000, 2**20])
def test_blocks_cover_every_image_once(monkeypatch, limit):
    limits = dict.fromkeys((False, True), limit)
    monkeypatch.setattr(convolution, "_BLOCK_BYTES", limits)
    x, kernel = draw(9, 4, images=6, dtype=np.float32)
    sizes = {1: 1, 5_000: 1, 2**20: 6}
    assert convolution._blocks(x, x).shape[1] == sizes[limit] or limit == 5_000
    slope = jax.grad(lambda conv, k: jnp.sum(jnp.sin(conv(x, k))), 1)
    slope = jax.jit(slope, static_argnums=0)
    blocked = functools.partial(conv2d, method="blocked")
    assert_same(slope(blocked, kernel), slope(reference, kernel), 1e-5)


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for param in eqn.params.values():
            for inner in param if isinstance(param, (tuple, list)) else [param]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)


def test_slices_are_products_of_matrices():
    """With more axes XLA:CPU copies the cotangent to transpose it, pixel by pixel."""
    x, kernel = draw(9, 4, dtype=np.float32)
    conv = functools.partial(conv2d, method="slices", strides=2)
    slope = jax.grad(lambda x, k: jnp.sin(conv(x, k)).sum(), (0, 1))
    products = [
        eqn
        for eqn in primitives(jax.make_jaxpr(slope)(x, kernel).jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert len(products) == 3
    assert all(v.aval.ndim == 2 for eqn in products for v in eqn.invars)


def grouped(method):
    """Grouped convolutions in the program of a second-order step with 2 tasks."""
    conv = functools.partial(conv2d, method=method)
    x, kernel = draw(9, 9, dtype=np.float32)
    xs, kernels = jnp.stack([x, x]), jnp.stack([kernel, kernel])
    per_task = jax.vmap(jax.grad(functools.partial(step, conv), (0, 1)))
    program = jax.make_jaxpr(per_task)(xs, kernels)
    return [
        eqn
        for eqn in primitives(program.jaxpr)
        if eqn.primitive.name == "conv_general_dilated"
        and max(eqn.params["feature_group_count"], eqn.params["batch_group_count"]) > 1
    ]


def test_per_task_kernels_make_no_grouped_convolution_on_a_cpu():
    assert default_method((3, 3, 9, 9), backend="cpu") == "blocked"
    assert not grouped("blocked")
    assert not grouped("slices")
    assert grouped("xla")  # the check finds what it looks for


def test_the_default_depends_on_the_backend_and_the_kernel():
    assert default_method((3, 3, 32, 32), backend="gpu") == "xla"
    assert default_method((3, 3, 32, 32), backend="tpu") == "xla"
    assert default_method((3, 3, 32, 32), strides=2, backend="cpu") == "slices"
    assert default_method((1, 1, 32, 32), backend="cpu") == "slices"


def test_inside_shard_map_gradients_are_summed_over_devices():
    x, kernel = draw(9, 3, dtype=np.float32)
    mesh = jax.make_mesh((1,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("task")

    def loss(kernel, x):
        return jnp.sum(conv2d(x, kernel, method="blocked") ** 2)

    def sharded(kernel, x):
        return jax.grad(loss)(kernel, x)

    ours = jax.jit(
        jax.shard_map(
            sharded,
            mesh=mesh,
            in_specs=(PartitionSpec(), spec),
            out_specs=PartitionSpec(),
        )
    )(kernel, x)
    assert_same(ours, jax.grad(loss)(kernel, x), 1e-5)


def test_mistakes_name_the_remedy():
    x, kernel = draw(dtype=np.float32)
    with pytest.raises(ValueError, match="method='fast': choose"):
        conv2d(x, kernel, method="fast")
    with pytest.raises(ValueError, match=r"strides=2.*use 'slices'"):
        conv2d(x, kernel, strides=2, method="blocked")
    with pytest.raises(ValueError, match="with the same C"):
        conv2d(x, kernel[:, :, :1])
    with pytest.raises(ValueError, match="padding='CAUSAL'"):
        conv2d(x, kernel, padding="CAUSAL")
