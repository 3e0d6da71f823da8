"""Pre-train a Conv4-32 on the 64 training classes of mini-ImageNet, resumable.

Writes <out>/<name>.npz (arrays by name: body, head, statistics, momentum) and
<out>/<name>.json (settings, progress, validation curve), both whole or not at all.
Started again with the same arguments it goes on where it stopped.

--engine jax is the library's own Conv4 and JAX's derivatives; --engine native is the
same mathematics in fastconv.cpp (see check_engine.py), for CPUs with AVX-512.
"""

from __future__ import annotations

import argparse, json, os, time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np

EPS = 1e-3  # of the batch norm
D = 32


def parse():
    p = argparse.ArgumentParser()
    a = p.add_argument
    a("--name", required=True)
    a("--out", default=".")
    a("--cache", required=True, help="the library's decoded mini-imagenet-84-*.npz")
    a("--engine", default="native16", choices=["native16", "native", "jax"])
    a("--seed", type=int, default=0)
    a("--images", type=int, required=True, help="planned; the rate's schedule rests on it")
    a("--stages", default="84:1", help="size:share of the images, in turn")
    a("--batch", type=int, default=64)
    a("--lr", type=float, default=0.1)
    a("--opt", default="sgd", choices=["sgd", "adam"])
    a("--momentum", type=float, default=0.9)
    a("--wd", type=float, default=5e-4)
    a("--warmup", type=float, default=0.05)
    a("--schedule", default="cosine", choices=["cosine", "linear"])
    a("--head", default="cosine", choices=["cosine", "linear"])
    a("--scale", type=float, default=10.0)
    a("--final-relu", type=int, default=1)
    a("--smooth", type=float, default=0.0)
    a("--min-area", type=float, default=0.35)
    a("--jitter", type=float, default=0.0)
    a("--proto", type=float, default=0.0, help="weight of the episodic loss in the batch")
    a("--per-class", type=int, default=0, help="batches of batch / per-class classes")
    a("--init-from", default="", help="start at this run's arrays; the rest afresh")
    a("--classes", type=int, default=64, help="only the first so many")
    a("--roll", type=int, default=0, help="which class is the first")
    a("--plain", type=int, default=0, help="1: no crops, no flips")
    a("--eval-every", type=float, default=300, help="seconds")
    a("--stop-after", type=float, default=0, help="seconds of this process; 0: none")
    return p.parse_args()


# ---------------------------------------------------------------- parameters


def init(seed, classes, head):
    r = np.random.default_rng([seed, 1])
    params, stats = {}, {}
    for i in range(1, 5):
        c = 3 if i == 1 else D
        b = (9 * c) ** -0.5
        params[f"conv{i}.kernel"] = r.uniform(-b, b, (3, 3, c, D)).astype(np.float32)
        params[f"norm{i}.scale"] = np.ones(D, np.float32)
        params[f"norm{i}.bias"] = np.zeros(D, np.float32)
        stats[f"norm{i}.mean"] = np.zeros(D, np.float32)
        stats[f"norm{i}.var"] = np.ones(D, np.float32)
    w = 25 * D
    params["head.kernel"] = (r.standard_normal((w, classes)) * w**-0.5).astype(np.float32)
    if head == "cosine":
        params["head.scale"] = np.ones((), np.float32)  # times --scale
    else:
        params["head.bias"] = np.zeros(classes, np.float32)
    return params, stats


def enlarge(side):
    """[25, side^2]: maps of side x side to 5 x 5, bilinear; None if 5 already."""
    if side == 5:
        return None
    at = np.clip((np.arange(5) + 0.5) * side / 5 - 0.5, 0, side - 1)
    one = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(side)))
    return np.kron(one, one).astype(np.float32)


def unit(x):
    n = np.sqrt((x * x).sum(-1, keepdims=True)) + 1e-6
    return x / n, n


def head_loss(a, params, feats, y, grads):
    """Loss, accuracy and the gradient by the features [N, 800]; fills grads."""
    n = len(y)
    k = params["head.kernel"]
    if a.head == "cosine":
        s = a.scale * params["head.scale"]
        u, un = unit(feats)
        v, vn = unit(k.T)
        cos = u @ v.T
        logits = s * cos
    else:
        logits = feats @ k + params["head.bias"]
    z = logits - logits.max(1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    t = np.full(logits.shape, a.smooth / logits.shape[1], np.float32)
    t[np.arange(n), y] += 1 - a.smooth
    loss = -(t * logp).sum(1).mean()
    acc = (logits.argmax(1) == y).mean()
    dl = (np.exp(logp) - t) / n
    if a.head == "cosine":
        grads["head.scale"] = np.float32(a.scale * (dl * cos).sum())
        dc = dl * s
        du, dv = dc @ v, dc.T @ u
        df = (du - u * (du * u).sum(1, keepdims=True)) / un
        grads["head.kernel"] = ((dv - v * (dv * v).sum(1, keepdims=True)) / vn).T
    else:
        df = dl @ k.T
        grads["head.kernel"], grads["head.bias"] = feats.T @ dl, dl.sum(0)
    if a.proto:
        loss_p, df_p = proto_loss(feats, y, 10.0)
        loss, df = loss + a.proto * loss_p, df + a.proto * df_p
    return loss, acc, df.astype(np.float32)


def proto_loss(feats, y, s):
    """Leave-one-out cosine centroids within the batch, over classes with >= 2 images."""
    u, un = unit(feats)
    ids, inv, counts = np.unique(y, return_inverse=True, return_counts=True)
    onehot = np.zeros((len(y), len(ids)), np.float32)
    onehot[np.arange(len(y)), inv] = 1
    sums = onehot.T @ u  # [K, d]
    own = sums[inv] - u
    ok = counts[inv] >= 2
    cm, cmn = unit(sums)
    co, con = unit(own)
    sims = u @ cm.T
    rows = np.arange(len(y))
    sims[rows, inv] = (u * co).sum(1)
    z = s * sims
    z -= z.max(1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    m = ok.sum() + 1e-6
    loss = -(logp[rows, inv] * ok).sum() / m
    dz = np.exp(logp)
    dz[rows, inv] -= 1
    dz *= (ok / m)[:, None] * s
    d_own = dz[rows, inv].copy()
    dz[rows, inv] = 0
    du = dz @ cm + d_own[:, None] * co
    dcm = dz.T @ u
    dsum = (dcm - cm * (dcm * cm).sum(1, keepdims=True)) / cmn
    dco = d_own[:, None] * u
    down = (dco - co * (dco * co).sum(1, keepdims=True)) / con
    total = onehot.T @ down + dsum
    du += total[inv] - down
    return loss, (du - u * (du * u).sum(1, keepdims=True)) / un


# ---------------------------------------------------------------- engines


class JaxEngine:
    def __init__(self, final_relu):
        import jax
        from metalstm.compilation import Jitted
        from metalstm.networks import Conv4

        net = Conv4(None, final_relu=bool(final_relu), momentum=0.0)

        def tree(flat):
            out = {}
            for name, x in flat.items():
                m, leaf = name.split(".")
                out.setdefault(m, {})[leaf] = x
            for i in range(1, 5):
                if f"conv{i}" in out:
                    out[f"conv{i}"]["bias"] = np.zeros(D, np.float32)
            return out

        def forward(params, x):
            feats, new = net.apply(
                {"params": tree(params), "batch_stats": zero_stats}, x, True,
                mutable=["batch_stats"],
            )
            return feats, new["batch_stats"]

        zero_stats = {
            f"norm{i}": {"mean": np.zeros(D, np.float32), "var": np.ones(D, np.float32)}
            for i in range(1, 5)
        }

        def scalar(params, x, df):
            feats, stats = forward(params, x)
            return (feats * df).sum(), stats

        self._forward = Jitted(forward)
        self._backward = Jitted(lambda p, x, df: jax.grad(scalar, has_aux=True)(p, x, df)[0])
        self._stored = Jitted(
            lambda p, s, x: net.apply({"params": tree(p), "batch_stats": tree(s)}, x, False)
        )

    def body(self, params):
        return {k: v for k, v in params.items() if not k.startswith("head")}

    def forward(self, params, x):
        """Features [N, d] and batch statistics."""
        self._last = (self.body(params), x)
        feats, s = self._forward(*self._last)
        stats = {f"{m}.{k}": np.asarray(v) for m, t in s.items() for k, v in t.items()}
        return np.array(feats), stats

    def backward(self, df):
        g = self._backward(*self._last, df)
        return {k: np.array(v) for k, v in g.items()}

    def stored(self, params, stats, x):
        return np.asarray(self._stored(self.body(params), stats, x))


def make_engine(a):
    if a.engine == "jax":
        return JaxEngine(a.final_relu)
    from native import NativeEngine

    return NativeEngine(a.final_relu, a.engine == "native16")


# ---------------------------------------------------------------- data


def augment(r, images, index, a, size):
    """uint8 [M, 84, 84, 3] -> float32 [N, size, size, 3] in [0, 1]: crop, flip, jitter."""
    import cv2

    cv2.setNumThreads(0)
    n = len(index)
    out = np.empty((n, size, size, 3), np.float32)
    area = r.uniform(a.min_area, 1.0, n)
    ratio = np.exp(r.uniform(-np.log(4 / 3), np.log(4 / 3), n) / 2)
    h = np.minimum(np.sqrt(area) * ratio, 1) * 84
    w = np.minimum(np.sqrt(area) / ratio, 1) * 84
    y0, x0 = r.uniform(size=n) * (84 - h), r.uniform(size=n) * (84 - w)
    flip = r.uniform(size=n) < 0.5
    if a.plain:
        h, w = np.full(n, 84.0), np.full(n, 84.0)
        y0, x0, flip = np.zeros(n), np.zeros(n), np.zeros(n, bool)
    for i, j in enumerate(index):
        sx, sy = w[i] / size, h[i] / size
        m = np.array([[sx, 0, x0[i] + sx / 2 - 0.5], [0, sy, y0[i] + sy / 2 - 0.5]])
        if flip[i]:
            m[0] = [-sx, 0, x0[i] + w[i] - sx / 2 - 0.5]
        src = images[j]
        if max(sx, sy) > 1.3:  # the lower sizes: take means of 2 x 2 first
            src = cv2.resize(src, (42, 42), interpolation=cv2.INTER_AREA)
            m[:, :2] /= 2
            m[:, 2] = (m[:, 2] + 0.5) / 2 - 0.5
        out[i] = cv2.warpAffine(
            src, m, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
    out *= 1 / 255
    if a.jitter:
        b, c, s = (1 + a.jitter * r.uniform(-1, 1, (3, n, 1, 1, 1))).astype(np.float32)
        out *= b
        grey = out @ np.array([[0.299], [0.587], [0.114]], np.float32)
        out = grey + s * (out - grey)
        mean = grey.mean((1, 2, 3), keepdims=True)
        out = np.clip(mean + c * (out - mean), 0, 1)
    return np.ascontiguousarray(out, np.float32)


# ---------------------------------------------------------------- validation


def features(engine, params, stats, images, block=100):
    flat = images.reshape(-1, *images.shape[-3:])
    out = [
        engine.stored(params, stats, flat[i : i + block].astype(np.float32) / 255)
        for i in range(0, len(flat), block)
    ]
    return np.concatenate(out)


def episodes(feats, episodes, shot, seed=7, way=5, queries=15):
    """Nearest centroid by cosine over [C, M, d]; mean accuracy and its 95% interval."""
    r = np.random.default_rng([seed, shot])
    accs = []
    for _ in range(episodes):
        c = r.choice(len(feats), way, replace=False)
        picks = [r.choice(feats.shape[1], shot + queries, replace=False) for _ in c]
        f = np.stack([feats[k, p] for k, p in zip(c, picks)])
        proto = unit(f[:, :shot].mean(1))[0]
        q = f[:, shot:].reshape(way * queries, -1)
        accs.append(((q @ proto.T).argmax(1) == np.repeat(np.arange(way), queries)).mean())
    accs = 100 * np.array(accs)
    return [round(accs.mean(), 2), round(1.96 * accs.std() / len(accs) ** 0.5, 2)]


def clean_stats(engine, params, train):
    """Mean batch statistics over 20 whole images of each training class."""
    r = np.random.default_rng(0)
    picks = r.choice(train.shape[1], 20, replace=False)
    x = train[:, picks].reshape(-1, *train.shape[2:])
    x = x[r.permutation(len(x))].astype(np.float32) / 255
    found = [engine.forward(params, x[i : i + 64])[1] for i in range(0, len(x) - 63, 64)]
    return {k: np.mean([s[k] for s in found], 0, dtype=np.float32) for k in found[0]}


def validate(engine, params, stats, train, val, num=600):
    base = features(engine, params, stats, train[:, :10]).mean(0)
    f = features(engine, params, stats, val)
    f = f.reshape(len(val), -1, f.shape[-1])
    raw, centred = unit(f)[0], unit(f - base)[0]
    return {
        "raw1": episodes(raw, num, 1), "raw5": episodes(raw, num, 5),
        "cl2n1": episodes(centred, num, 1), "cl2n5": episodes(centred, num, 5),
    }


# ---------------------------------------------------------------- main


def save(path, arrays, record):
    for suffix, write in (
        (".npz", lambda f: np.savez(f, **arrays)),
        (".json", lambda f: f.write(json.dumps(record, indent=1).encode())),
    ):
        part = path.with_name(path.name + suffix + ".part")
        with open(part, "wb") as f:
            write(f)
        os.replace(part, path.with_name(path.name + suffix))


def main():
    a = parse()
    path = Path(a.out) / a.name
    with np.load(a.cache) as d:
        train, val = d["train.images"], d["validation.images"]
    train = np.roll(train, -a.roll, axis=0)[: a.classes] if a.roll else train[: a.classes]
    per_class = train.shape[1]
    flat = train.reshape(-1, *train.shape[2:])
    engine = make_engine(a)
    spec = {k: v for k, v in vars(a).items() if k not in ("out", "cache", "stop_after")}
    record_file = path.with_name(path.name + ".json")
    if record_file.exists():
        record = json.loads(record_file.read_text())
        with np.load(path.with_name(path.name + ".npz")) as f:
            stored = {k: f[k] for k in f.files}
        group = lambda g: {k[len(g):]: v for k, v in stored.items() if k.startswith(g)}
        params, stats, m1, m2 = map(group, ("params.", "stats.", "m1.", "m2."))
        step = record["step"]
    else:
        params, stats = init(a.seed, a.classes, a.head)
        if a.init_from:
            with np.load(a.init_from + ".npz") as f:
                params = {k: f[f"params.{k}"] for k in params}
                stats = {k: f[f"stats.{k}"] for k in stats}
        m1 = {k: np.zeros_like(v) for k, v in params.items()}
        m2 = {k: np.zeros_like(v) for k, v in params.items()} if a.opt == "adam" else {}
        step, record = 0, {"spec": spec, "curve": [], "seconds": 0.0, "step": 0}
    total = a.images // a.batch
    # [from step, progress there, planned steps, stages]: --images may be changed on the way, the
    # rate then goes on from where it is and reaches 0 at the new end
    plan = record.setdefault("plan", [])
    if not plan:
        plan.append([0, 0.0, record["spec"]["images"] // a.batch, record["spec"]["stages"]])
    progress = lambda k: plan[-1][1] + (1 - plan[-1][1]) * (k - plan[-1][0]) / (
        plan[-1][2] - plan[-1][0]
    )
    if plan[-1][2:] != [total, a.stages]:
        plan.append([step, progress(step), total, a.stages])
    stages, edge = [], 0
    for part in a.stages.split(","):
        size, share = part.split(":")
        edge += float(share)
        stages.append((int(size), edge))
    start, base_seconds, start_step = time.time(), record["seconds"], step
    last_eval, recent = start, []
    epoch, order = -1, None
    while step < total:
        seen = step * a.batch
        # a permutation an epoch, known from the seed and the epoch alone
        e = seen // len(flat)
        if e != epoch:
            epoch = e
            order = np.random.default_rng([a.seed, 2, e]).permutation(len(flat))
        at = seen % len(flat)
        index = order[at : at + a.batch]
        if len(index) < a.batch:
            nxt = np.random.default_rng([a.seed, 2, e + 1]).permutation(len(flat))
            index = np.concatenate([index, nxt[: a.batch - len(index)]])
        if a.per_class:
            q = np.random.default_rng([a.seed, 4, step])
            some = q.choice(a.classes, a.batch // a.per_class, replace=False)
            index = np.concatenate(
                [c * per_class + q.choice(per_class, a.per_class, replace=False) for c in some]
            )
        size = next(s for s, edge in stages if progress(step) < edge + 1e-9)
        r = np.random.default_rng([a.seed, 3, step])
        x = augment(r, flat, index, a, size)
        y = index // per_class
        feats, batch_stats = engine.forward(params, x)
        up = enlarge(size // 16)
        if up is not None:
            f5 = np.einsum("pq,nqc->npc", up, feats.reshape(a.batch, -1, D))
            f5 = np.ascontiguousarray(f5.reshape(a.batch, -1))
        else:
            f5 = feats
        grads = {}
        loss, acc, df = head_loss(a, params, f5, y, grads)
        if up is not None:
            df = np.einsum("pq,npc->nqc", up, df.reshape(a.batch, 25, D))
            df = np.ascontiguousarray(df.reshape(a.batch, -1))
        grads |= engine.backward(df)
        t = progress(step + 1)
        decay = 0.5 * (1 + np.cos(np.pi * t)) if a.schedule == "cosine" else 1 - t
        lr = a.lr * min(1.0, t / max(a.warmup, 1e-9)) * decay
        for k, g in grads.items():
            p = params[k]
            wd = a.wd if k.endswith("kernel") else 0.0
            if a.opt == "sgd":
                g = g + wd * p
                m1[k] = a.momentum * m1[k] + g
                p = p - lr * (g + a.momentum * m1[k])
            else:
                m1[k] = 0.9 * m1[k] + 0.1 * g
                m2[k] = 0.999 * m2[k] + 0.001 * g * g
                d = (m1[k] / (1 - 0.9 ** (step + 1))) / (
                    np.sqrt(m2[k] / (1 - 0.999 ** (step + 1))) + 1e-8
                )
                p = p - lr * (d + wd * p)
            params[k] = p.astype(np.float32)
        for k, v in batch_stats.items():
            keep = min(0.99, (step + 1) / (step + 10))
            stats[k] = (keep * stats[k] + (1 - keep) * v).astype(np.float32)
        step += 1
        recent.append((loss, acc))
        now = time.time()
        stop = a.stop_after and now - start > a.stop_after
        if now - last_eval > a.eval_every or step == total or stop:
            rate = (step - start_step) * a.batch / (now - start)
            num = 2000 if step == total else 600
            some = val if step == total else val[:, ::3]
            entry = {
                "images": step * a.batch, "lr": round(lr, 5), "size": size,
                "seconds": round(base_seconds + now - start),
                "images_per_s": round(rate, 1),
                "loss": round(float(np.mean([x[0] for x in recent])), 4),
                "acc": round(100 * float(np.mean([x[1] for x in recent])), 2),
                **validate(engine, params, stats, train, some, num),
            }
            if step == total:  # averages over whole training images in place of crops
                clean = clean_stats(engine, params, train)
                entry["clean"] = validate(engine, params, clean, train, val, num)
            print(json.dumps(entry), flush=True)
            record["curve"].append(entry)
            record["step"], record["seconds"] = step, base_seconds + time.time() - start
            record["done"] = step >= total
            arrays = {
                f"{g}.{k}": v
                for g, t in (("params", params), ("stats", stats), ("m1", m1), ("m2", m2))
                for k, v in t.items()
            }
            if step == total:
                arrays |= {f"clean.{k}": v for k, v in clean.items()}
            save(path, arrays, record)
            last_eval, recent = time.time(), []
            if stop:
                return


if __name__ == "__main__":
    main()
