export METALSTM_CACHE_DIR=$ML/cache OPENBLAS_NUM_THREADS=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
export JAX_COMPILATION_CACHE_DIR=$ML/jaxcache313 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1 PATH=$REPO/.venv/bin:$PATH
export PYX="taskset -c 0 python"
cd $ML/mini && exec bash omni11.sh o-mann-layer --preset omniglot --algorithms mann --mann.num-slots 64 --norm layer --episodes 48000 --save-every 4000 --validate-every 4000 --validation-episodes 100
