"""Named recipes: a preset is the flags that differ from their defaults.

docs/results/learned_optimizers.md says what each gave.
"""

from __future__ import annotations

# What trained best: the LSTM reads what Adam reads, next to a learned shortcut to start
# from; second order; the log of the loss, late ones more; complete trajectories, short
# ones first.
_RECIPE = (
    "--l2l.features moments --l2l.num-layers 1 --l2l.output-scale 0.1 "
    "--l2l.shortcut 0.2 --order second --loss-transform log --weights linear "
    "--learning-rate 3e-3 --schedule cosine --unroll-steps 100 --horizon 100 "
)
# Andrychowicz et al. (2016), section 3.2: 784-20-10, sigmoid, batches of 128, 100 steps
_MLP = "--problem mlp --hidden 20 --activation sigmoid --init-std 0.01 "
_MNIST = (
    "--dataset mnist --batch-size 128 --num-tasks 1 --validate-every 50 "
    "--validation-instances 8 --save-every 25 --tune-instances 8 --long-instances 20 "
)
_EIGHT_UNITS = (
    "--l2l.hidden-size 8 --v2.memory.hidden-size 8 --v2-f1.memory.hidden-size 8 "
    "--meta-lstm.hidden-size 8 --meta-lstm-f1.hidden-size 8 "
)
_LEARNED_MNIST = _RECIPE + _MNIST + _EIGHT_UNITS + "--stages 50:400 --meta-steps 800 "

PRESETS = {
    # a look at everything in a few minutes
    "demo": _RECIPE + "--l2l.relative --num-tasks 32 --unroll-steps 50 --stages 20:100 "
    "--meta-steps 200 --validate-every 50 --save-every 50",
    # Gaussian quadratics, theta_0 ~ N(0, 1)
    "quadratics": _RECIPE
    + "--l2l.relative --num-tasks 128 --stages 20:300,50:300 --meta-steps 1200 "
    "--validate-every 100 --validation-instances 512 --save-every 100 "
    "--instances 1000 --tune-instances 256",
    # as published: W and y uniform, theta_0 ~ N(0, 0.01^2), truncated at 20
    "quadratics-published": "--distribution uniform --init-std 0.01 "
    "--rules l2l-published --l2l-published.features raw "
    "--l2l-published.output-scale 1.0 --num-tasks 128 --unroll-steps 20 "
    "--horizon 100 --meta-steps 10000 --validate-every 1000",
    "mnist-mlp": _MLP + _LEARNED_MNIST,
    # as published: truncated at 20, first order
    "mnist-mlp-published": _MLP
    + _MNIST
    + "--rules l2l-published --unroll-steps 20 --horizon 100 --meta-steps 10000 "
    "--validate-every 500 --save-every 250",
    # to hold on other networks and for longer: random scaling, a growing horizon
    "held": _MLP
    + _LEARNED_MNIST
    + "--stages 50:150 --unroll-steps 50 --horizon 1000 --first-horizon 100 "
    "--weights uniform --scaling 0.33 3 --scaling-per tensor --num-tasks 2 --stagger "
    "--study comparison,generalisation,cost",
    "mnist-conv": "--problem conv --separate conv-or-dense " + _LEARNED_MNIST,
    "plateau": "--problem plateau --rules gates,gates-f1,v2,v2-f1 --horizon 100 "
    "--num-tasks 64 --study comparison,plateau",
}
