# Start or resume the meta-training; nothing else may run the same folder (it is locked). REPO: a clone, frozen when it began.
export METALSTM_CACHE_DIR=CACHE_DIR OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
export JAX_COMPILATION_CACHE_DIR=CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
export PYTHONPATH=REPO:HERE/sk PATH=REPO/.venv/bin:$PATH
cd HERE && exec setsid taskset -c 1 python -m experiments.learned_optimizer.general --folder runs/w2 >> runs/w2.log 2>&1
