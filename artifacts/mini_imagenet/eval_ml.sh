cd $ML/frozen13; export PYTHONPATH=$ML/frozen13 JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$ML/jaxcache313 METALSTM_CACHE_DIR=$ML/cache
PY="taskset -c 0 $REPO/.venv/bin/python"; R=$1; D="--data-dir OMNI"; shift
$PY -m experiments.few_shot --evaluate $R $D --way 20 --shot 1 --queries 5
$PY -m experiments.few_shot --evaluate $R $D --shot 5 --queries 15
$PY -m experiments.few_shot --evaluate $R $D --way 20 --shot 5 --queries 5
