export METALSTM_CACHE_DIR=$ML/cache OPENBLAS_NUM_THREADS=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
export JAX_COMPILATION_CACHE_DIR=$ML/jaxcache313 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1 PATH=$REPO/.venv/bin:$PATH
export PYTHONPATH=$ML/frozen12
cd $ML/mini
if [ -f o-mann-kept2/config.json ]; then exec taskset -c 1 python -m experiments.few_shot --resume o-mann-kept2; fi
exec taskset -c 1 python -m experiments.few_shot --workdir o-mann-kept2 --data-dir $ML/data/tensorflow_datasets --preset omniglot --algorithms mann --mann.num-slots 64 --no-train-learner --mann.train-queries 1 --init-from o-proto:prototypical --episodes 160000 --save-every 20000 --validate-every 10000 --validation-episodes 100
