"""Head-only updates from zero on stored features: which i of the head, T, and length?"""
import json, sys
import numpy as np
from pretrain import features, unit, make_engine

class A: pass
path = sys.argv[1]
spec = json.load(open(path + ".json"))["spec"]
A.engine, A.final_relu = "native16", spec["final_relu"]
eng = make_engine(A)
with np.load(path + ".npz") as f:
    P = {k[7:]: f[k] for k in f.files if k.startswith("params.")}
    S = {k[6:]: f[k] for k in f.files if k.startswith("clean.")}
with np.load(sys.argv[2]) as d:
    val = d["validation.images"][:, ::2]
f = features(eng, P, S, val); f = f.reshape(16, -1, f.shape[-1])
u = unit(f)[0]
def run(shot, i, T, length, episodes=1000):
    r = np.random.default_rng([7, shot]); out = []
    for _ in range(episodes):
        c = r.choice(16, 5, replace=False)
        x = np.stack([u[k, r.choice(300, shot + 15, replace=False)] for k in c]) * length
        s, q = x[:, :shot].reshape(5 * shot, -1), x[:, shot:].reshape(75, -1)
        Y = np.repeat(np.eye(5), shot, 0); W = np.zeros((5, s.shape[1]), np.float32); b = np.zeros(5)
        for _ in range(T):
            z = s @ W.T + b; z -= z.max(1, keepdims=True); p = np.exp(z); p /= p.sum(1, keepdims=True)
            g = (p - Y) / len(s)
            W -= i * 5 * (g.T @ s); b -= i * 5 * g.sum(0)
        out.append(((q @ W.T + b).argmax(1) == np.repeat(np.arange(5), 15)).mean())
    return f"{100*np.mean(out):.2f}"

for shot in (1, 5):
    for length in (2.0, 5.0, 10.0):
        for i in (0.03, 0.1, 0.3):
            print(shot, length, i, [run(shot, i, T, length) for T in (1, 5, 10)], flush=True)
