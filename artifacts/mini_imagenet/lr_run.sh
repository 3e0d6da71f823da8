# lr_run.sh WORKDIR ARGS...: the study of learned rules by the newer library
export PYTHONPATH=$ML/frozen10
d=$1; shift
exec $PYX -m experiments.studies.learned_rules --workdir $d "$@"
