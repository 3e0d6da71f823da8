"""Write a trained Meta-LSTM as a file that ships: theta_0 of one run, the rule of another.

  python ship.py --theta f4 --rule nH1 --shot 1 --seed 0 --out mini-imagenet-1shot-0.npz
"""
import argparse, json, os
import jax, numpy as np
import metalstm
from experiments.common.report import versions
from experiments.common.saved_options import to_json
from experiments.few_shot.command_line import parse
from experiments.few_shot.data import load_source
from experiments.few_shot.methods import specs_of
from metalstm import nn
from metalstm.base import LearnerState
from metalstm.specs import build_algorithm
from meta_train import by_path, load, logit

p = argparse.ArgumentParser()
p.add_argument("--theta", required=True)
p.add_argument("--rule", default=None)
p.add_argument("--shot", type=int, default=1)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--out", required=True)
p.add_argument("--info", default="{}", help="JSON: trained_on, result, limits, meta_training")
p.add_argument("--data", default=os.environ.get("DATA"))
a = p.parse_args()
head, body = logit(0.1), logit(1e-3)
line = f"""--dataset mini-imagenet --data-dir {a.data} --way 5 --shot {a.shot} --queries 15 --algorithms meta-lstm
--test-episodes 2000 --test-batch 4 --seed {a.seed} --filters 32 --no-final-relu --momentum 0.95 --tied-head --feature-length 5
--num-steps 5 --query-norm frozen --train-query-norm frozen --frozen-stats kept --support-stats final --gradient-scale way
--train-way 5 --order first --hidden-size 4 --bias-per tensor --forget-bias 10 10 --input-bias {body} {body}
--input-bias-of head {head} {head} --meta-batch 1 --augment crop-flip --schedule cosine --theta-learning-rate 0
--episodes 1000 --validate-every 250""".split()
options = parse(line)
source = load_source(options.data, {})
spec = specs_of(options, source.dataset.train.num_classes)["meta-lstm"]
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
start = nn.init_from(params.learner, LearnerState(theta, stats, {}))
print(len(start.taken), "taken; left:", start.left)
rule = params.rule
if a.rule:
    with np.load(a.rule + ".npz") as z:
        rule = load(rule, {k[5:]: v for k, v in z.items() if k.startswith("rule.")})
params = params._replace(learner=start.state, rule=rule)
config = to_json(options)
config["data"]["data_dir"] = None
info = json.loads(a.info) | {"config": config, "data": source.describe(), "versions": versions()}
print(metalstm.save(a.out, algorithm, params, source.dataset.train, source.test, info=info), os.path.getsize(a.out))
