# Start or resume the ablations, low priority: CORE=1 setsid bash ablations_go.sh, then echo 8 > /proc/PID/autogroup.
export METALSTM_CACHE_DIR=$ML/cache OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
export JAX_COMPILATION_CACHE_DIR=$ML/jaxcache313 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
export PYTHONPATH=$ML/opt/frozen8:$ML/opt/sk PATH=$REPO/.venv/bin:$PATH
cd $ML/opt && exec python run_queue.py ${QUEUE:-ablations_queue.txt}
