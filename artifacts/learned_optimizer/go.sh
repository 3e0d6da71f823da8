# Start the queue: resumable, each line once. Nothing else may run the same folder.
export METALSTM_CACHE_DIR=CACHE_DIR OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
export JAX_COMPILATION_CACHE_DIR=CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
export PYTHONPATH=REPO:HERE/sk PATH=REPO/.venv/bin:$PATH
export RUN="taskset -c 1 python -m experiments.learned_optimizer.general"
cp -n HERE/run_queue.py HERE/run_queue.py
cd HERE && exec setsid python run_queue.py queue.txt
