"""The native engine against the library's Conv4 and JAX's derivatives; then its speed."""
import sys, time
import numpy as np
from pretrain import JaxEngine, init
from native import NativeEngine

r = np.random.default_rng(0)
if "speed" not in sys.argv:
    for size, relu, half in ((84, 1, 0), (42, 0, 0), (64, 1, 0), (84, 1, 1), (42, 0, 1), (64, 1, 1)):
        params, stats = init(3, 64, "cosine")
        params = {k: (v + 0.3 * r.standard_normal(v.shape)).astype(np.float32) if "norm" in k else v for k, v in params.items()}
        params["norm2.scale"][:5] *= -1
        x = r.uniform(size=(6, size, size, 3)).astype(np.float32)
        if size == 84:
            x[0, :20, :20] = 1.0  # ties in the pools
        j, n = JaxEngine(relu), NativeEngine(relu, half)
        (fj, sj), (fn, sn) = j.forward(params, x), n.forward(params, x)
        err = lambda a, b: float(np.abs(a - b).max() / (np.abs(a).max() + 1e-9))
        print(size, relu, half, "features", err(fj, fn), "stats", max(err(sj[k], sn[k]) for k in sn))
        df = r.standard_normal(fj.shape).astype(np.float32)
        gj, gn = j.backward(df), n.backward(df)
        print({k: f"{err(gj[k], gn[k]):.1e}" for k in gn})
        cos = lambda a, b: float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
        print({k: f"{cos(gj[k], gn[k]):.5f}" for k in gn})
        print("stored", err(j.stored(params, sj, x), n.stored(params, sj, x)))
for half in (0, 1):
  for size, batch in ((84, 64), (42, 64)):
    params, stats = init(3, 64, "cosine")
    n = NativeEngine(1, half)
    x = r.uniform(size=(batch, size, size, 3)).astype(np.float32)
    fs, bs = [], []
    for _ in range(12):
        t0 = time.process_time(); f, _s = n.forward(params, x); t1 = time.process_time()
        n.backward(f); t2 = time.process_time()
        fs.append(t1 - t0); bs.append(t2 - t1)
    for how in (np.median, np.min):
        f, b = how(fs[1:]) / batch * 1e3, how(bs[1:]) / batch * 1e3
        print(f"half {half}, {size}: forward {f:.2f} ms, backward {b:.2f} ms an image: {1e3 / (f + b):.0f} images/s ({how.__name__})")
