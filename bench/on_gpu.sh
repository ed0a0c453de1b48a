#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, torch, nvcc and no network, in nine minutes.
#
#   bench/on_gpu.sh                      every phase
#   bench/on_gpu.sh build test           some of: env build test ops step summary
#
# PYTHON (python3) is the interpreter that has torch; RESULTS_DIR (bench/results/<device>) is where
# the JSON lines, the tests' log and summary.md go. A phase that fails or runs out of its time does
# not stop the next one; the exit code says whether all of them passed.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
results=${RESULTS_DIR:-bench/results/$device}
mkdir -p "$results"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# The package is run where it lies: nothing has to be installed.
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}

env_() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  "$python" -m memdlm.cli env
}

build() {
  local capability
  capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  # Only for this GPU: a minute less of nvcc.
  CUDAARCHS=$capability MEMDLM_CUDA=ON "$python" -m pip install --quiet --no-build-isolation \
    --no-deps --no-index --editable .
}

test_() {
  # Several processes: most of the time goes into compiling kernels.
  "$python" -m pytest -m gpu -q -n 8 tests/kernels tests/gpu 2>&1 | tee "$results/tests.log"
}

ops() {
  rm -f "$results/ops.jsonl"
  "$python" -m bench.gpu_targets --json "$results/ops.jsonl"
}

step() {
  rm -f "$results/step.jsonl"
  "$python" -m bench.step --device cuda --dtype bfloat16 --preset llada_moe --k 1 2 4 \
    --without_naive --repeats 5 --batches 1 --json "$results/step.jsonl"
  "$python" -m bench.launches --preset llada_moe --k 1 2 3
}

summary() {
  "$python" -m bench.summary "$results" | tee "$results/summary.md"
}

# Seconds that each phase may take: 530 in all.
declare -A limit=([env]=20 [build]=90 [test]=170 [ops]=110 [step]=130 [summary]=10)
declare -A function=([env]=env_ [build]=build [test]=test_ [ops]=ops [step]=step [summary]=summary)
export -f env_ build test_ ops step summary
export python results

failed=()
for phase in "${@:-env build test ops step summary}"; do
  for name in $phase; do
    if [[ -z ${limit[$name]:-} ]]; then
      echo "on_gpu: phase must be one of env build test ops step summary, got $name" >&2
      exit 2
    fi
    echo "== $name"
    begin=$SECONDS
    timeout "${limit[$name]}" bash -c "set -uo pipefail; ${function[$name]}" || failed+=("$name")
    echo "== $name took $((SECONDS - begin)) s"
  done
done
if ((${#failed[@]})); then
  echo "on_gpu: failed: ${failed[*]}" >&2
  exit 1
fi
