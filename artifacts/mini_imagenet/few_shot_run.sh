# few_shot_run.sh WORKDIR ARGS...: start the library's run, or resume it where it is
export PYTHONPATH=LIB
d=$1; shift
if [ -f $d/config.json ]; then exec $PYX -m experiments.few_shot --resume $d; fi
exec $PYX -m experiments.few_shot --workdir $d "$@"
