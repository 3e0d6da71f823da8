# eval5.sh RUN...: 5-shot of finished runs on mini-ImageNet, 2,000 test episodes
export PYTHONPATH=$ML/frozen13
exec $PYX -m experiments.few_shot --evaluate "$@" --data-dir $DATA --shot 5 --test-episodes 2000
