# Start the held-out queue (not before the lead agrees: hours). CORE=0 or 1.
export METALSTM_CACHE_DIR=CACHE_DIR OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
export JAX_COMPILATION_CACHE_DIR=CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
export PYTHONPATH=REPO PATH=REPO/.venv/bin:$PATH
export HELD="taskset -c ${CORE:-0} python -m experiments.learned_optimizer.held_out --data-dir DATA --folder HERE/runs/held_out"
cd HERE && exec setsid python run_queue.py held_out_queue.txt
