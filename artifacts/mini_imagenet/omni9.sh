# omni9.sh WORKDIR ARGS...: on Omniglot by the library of 29 November, 13:40 (9679920)
export PYTHONPATH=LIB
d=$1; shift
if [ -f $d/config.json ]; then exec $PYX -m experiments.few_shot --resume $d; fi
exec $PYX -m experiments.few_shot --workdir $d --data-dir OMNI "$@"
