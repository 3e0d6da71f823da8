# eval_omni.sh RUN : 5w5s, 20w1s, 20w5s inductive, 5w1s and 20w1s transductive
cd $ML/frozen13; export PYTHONPATH=$ML/frozen13 JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$ML/jaxcache313 METALSTM_CACHE_DIR=$ML/cache
PY="taskset -c 0 $REPO/.venv/bin/python"; R=$1; D="--data-dir OMNI"; shift
for q in support $TRANS; do
$PY -m experiments.few_shot --evaluate $R $D --query-norm $q --shot 1 --queries 15 
$PY -m experiments.few_shot --evaluate $R $D --query-norm $q --shot 5 --queries 15 
$PY -m experiments.few_shot --evaluate $R $D --query-norm $q --way 20 --shot 1 --queries 5 
[ $q = support ] && $PY -m experiments.few_shot --evaluate $R $D --query-norm $q --way 20 --shot 5 --queries 5
done
true
