"""Write a pre-trained classifier as a file of the library: the body of one run, compared by METHOD.

  python ship_features.py --theta s0 --method feature-cosine --shot 1 --out mini-imagenet-classifier-0.npz
"""
import argparse, json, os
import jax, numpy as np
import metalstm
from experiments.common.report import versions
from experiments.common.saved_options import to_json
from experiments.few_shot.command_line import parse
from experiments.few_shot.data import load_source
from experiments.few_shot.methods import specs_of
from metalstm.base import LearnerState
from metalstm import nn
from metalstm.specs import build_algorithm

p = argparse.ArgumentParser()
p.add_argument("--theta", required=True)
p.add_argument("--method", default="feature-cosine")
p.add_argument("--shot", type=int, default=1)
p.add_argument("--out", required=True)
p.add_argument("--extra", default="")
p.add_argument("--info", default="{}")
p.add_argument("--data", default=os.environ.get("DATA"))
a = p.parse_args()
line = f"""--dataset mini-imagenet --data-dir {a.data} --way 5 --shot {a.shot} --queries 15 --algorithms {a.method}
--test-episodes 2000 --test-batch 4 --filters 32 --no-final-relu --momentum 0.95
--augment crop-flip --schedule cosine {a.extra}""".split()
if a.method.startswith("feature"): line += f"--{a.method}.classifier cosine --{a.method}.batch-size 128 --{a.method}.per-class 4 --{a.method}.centroid-weight 1".split()
options = parse(line)
source = load_source(options.data, {})
spec = specs_of(options, source.dataset.train.num_classes)[a.method]
algorithm = build_algorithm(spec)
episode = source.test.sample(metalstm.data.episode_key(0, "test", 0), source.dataset.train)
params = algorithm.init(jax.random.key(0), episode)
with np.load(a.theta + ".npz") as z:
    arrays = dict(z)
group = "clean" if "clean.norm1.mean" in arrays else "stats"
theta, stats = {}, {}
for i in range(1, 5):
    theta[f"conv{i}"] = {"kernel": arrays[f"params.conv{i}.kernel"], "bias": np.zeros(32, np.float32)}
    theta[f"norm{i}"] = {k: arrays[f"params.norm{i}.{k}"] for k in ("scale", "bias")}
    stats[f"norm{i}"] = {k: arrays[f"{group}.norm{i}.{k}"] for k in ("mean", "var")}
old = params.learner if hasattr(params, "learner") else params
print(jax.tree.map(np.shape, old))
theta = {"body": theta}
if "params.head.kernel" in arrays and a.method.startswith("feature"):
    theta["head"] = {"kernel": arrays["params.head.kernel"]}
start = nn.init_from(old, LearnerState(theta, stats, {}))
print(len(start.taken), "taken; left:", start.left)
params = params._replace(learner=start.state) if hasattr(params, "learner") else start.state
config = to_json(options)
config["data"]["data_dir"] = None
info = json.loads(a.info) | {"config": config, "data": source.describe(), "versions": versions()}
print(metalstm.save(a.out, algorithm, params, source.dataset.train, source.test, info=info), os.path.getsize(a.out))
