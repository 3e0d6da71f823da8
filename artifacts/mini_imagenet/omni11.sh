# omni_run.sh WORKDIR ARGS...: like few_shot_run.sh, on Omniglot by the newer library
export PYTHONPATH=$ML/frozen11
d=$1; shift
if [ -f $d/config.json ]; then exec $PYX -m experiments.few_shot --resume $d; fi
exec $PYX -m experiments.few_shot --workdir $d --data-dir $ML/data/tensorflow_datasets "$@"
