# Start the held-out queue (not before the lead agrees: hours). CORE=0 or 1.
export METALSTM_CACHE_DIR=$ML/cache OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
export JAX_COMPILATION_CACHE_DIR=$ML/jaxcache313 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
export PYTHONPATH=$ML/opt/frozen5 PATH=$REPO/.venv/bin:$PATH
export HELD="taskset -c ${CORE:-1} python -m experiments.learned_optimizer.held_out --data-dir $ML/data --folder $ML/opt/runs/held_out"
cd $ML/opt && exec setsid python run_queue.py rule_queue.txt
