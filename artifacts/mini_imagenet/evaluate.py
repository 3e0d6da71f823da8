"""Evaluate a Meta-LSTM: theta_0 of one run, the rule of another, by the library alone.

  python evaluate.py --name e --theta f4 --rule nH1 --shot 1 --episodes 2000 --split validation
"""
import argparse, json, os, time
import jax, numpy as np
import metalstm
from metalstm import data
import meta_train as m
from diag import algo

p = argparse.ArgumentParser()
p.add_argument("--name", required=True)
p.add_argument("--theta", required=True)
p.add_argument("--rule", default=None)
p.add_argument("--shot", type=int, default=1)
p.add_argument("--steps", type=int, default=5)
p.add_argument("--i-head", type=float, default=0.1)
p.add_argument("--i-body", type=float, default=1e-3)
p.add_argument("--length", type=float, default=5.0)
p.add_argument("--split", default="validation")
p.add_argument("--seed", type=int, default=2)
p.add_argument("--episodes", type=int, default=1000)
p.add_argument("--data", default=os.environ.get("DATA"))
a = p.parse_args()
pools = data.load_mini_imagenet(a.data)
A = algo(a.shot, a.steps, a.i_head, a.i_body, length=a.length)
spec = data.EpisodeSpec(5, a.shot, 15)
e = spec.sample(data.episode_key(1, "validation", 0), pools.validation)
params = A.init(jax.random.key(0), e)
with np.load(a.theta + ".npz") as z:
    names = set(z.files)
if "learner.params.body.conv1.kernel" in names:
    with np.load(a.theta + ".npz") as z:
        params = params._replace(learner=m.load(params, {**dict(z), **{f"rule.{k}": v for k, v in m.by_path(params.rule).items()}}).learner)
else:
    params = params._replace(learner=m.state_of(a.theta + ".npz"))
if a.rule:
    with np.load(a.rule + ".npz") as z:
        params = params._replace(rule=m.load(params.rule, {k[5:]: v for k, v in z.items() if k.startswith("rule.")}))
start = time.time()
got = metalstm.make_evaluate(A, spec, batch_size=4)(params, pools.pool(a.split), num_episodes=a.episodes, seed=a.seed, split=a.split)
acc = np.asarray(got.accuracies) * 100
out = {"args": vars(a) | {"data": None}, "mean": round(float(acc.mean()), 2), "ci95": round(float(1.96 * acc.std(ddof=1) / len(acc) ** 0.5), 2), "seconds": round(time.time() - start)}
print(out)
json.dump(out, open(a.name + ".json", "w"), indent=1)
np.savez(a.name + ".npz", accuracies=acc.astype(np.float32))
