"""Programs are compiled with the options that are fastest where they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalstm.nn.convolution import conv2d
from metalstm.runtime import compilation
from metalstm.runtime.compilation import Jitted


@pytest.fixture
def cores(monkeypatch):
    def have(count: int) -> dict[str, str]:
        monkeypatch.setattr(compilation, "cores", lambda: count)
        compilation._known_options.cache_clear()
        return compilation.compiler_options()

    yield have
    compilation._known_options.cache_clear()


def images(num_images: int = 4):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_images, 42, 42, 32)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 32, 32)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(kernel)


@pytest.mark.parametrize("what", ["convolution", "dot"])
def test_cores_to_spare_share_the_work(what, cores):
    """Not so where each has a device of its own."""
    if jax.default_backend() != "cpu":
        assert cores(64) == {}
        return
    assert cores(jax.local_device_count()) == {}
    fn = conv2d
    if what == "dot":
        fn = lambda x, k: x.reshape(-1, 288) @ k.reshape(288, -1)  # noqa: E731
    alone = Jitted(fn).lower(*images()).compile().as_text()
    options = cores(jax.local_device_count() + 1)
    shared = Jitted(fn).lower(*images()).compile().as_text()
    if "ynn_fusion" in alone:  # else this jaxlib has XLA's own anyway
        assert options
    assert "ynn_fusion" not in shared
    assert f" {what}(" in shared
    one = jax.jit(fn)(*images())
    np.testing.assert_allclose(Jitted(fn)(*images()), one, rtol=1e-4, atol=1e-4)


def test_an_unknown_option_is_left_out(cores, monkeypatch):
    nonsense = {"xla_cpu_no_such_option": "1"}
    monkeypatch.setattr(compilation, "_ONLY_SUMS", nonsense)
    assert cores(64) == {}
    assert float(Jitted(lambda x: x + 1)(1.0)) == 2.0


def test_inside_another_program_its_options_hold(cores):
    cores(64)
    double = Jitted(lambda x: 2 * x)
    assert float(double(3.0)) == 6.0
    assert float(jax.jit(lambda x: double(x) + 1)(3.0)) == 7.0
    assert float(jax.grad(lambda x: double(x))(3.0)) == 2.0
    steps = jax.lax.scan(lambda x, _: (double(x), None), 1.0, length=3)
    assert float(steps[0]) == 8.0
    assert double._cache_size() == 1
