# fs10.sh WORKDIR ARGS...: start the library's run (29 November, 17:00), or resume it where it is
export PYTHONPATH=$ML/frozen13
d=$1; shift
if [ -f $d/config.json ]; then exec $PYX -m experiments.few_shot --resume $d; fi
exec $PYX -m experiments.few_shot --workdir $d --dataset mini-imagenet --data-dir $DATA --way 5 --shot 1 --queries 15 --filters 32 --no-final-relu --momentum 0.95 --init-from mini-imagenet-classifier-0 "$@"
