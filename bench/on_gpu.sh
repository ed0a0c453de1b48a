#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, torch, nvcc and no network, in nine minutes.
#
#   bench/on_gpu.sh                      every phase
#   bench/on_gpu.sh build test           some of: build env test ops step launches summary
#
# PYTHON (python3) is the interpreter that has torch; RESULTS_DIR (bench/results/<device>) is where
# the JSON lines, the tests' log and summary.md go. A phase that fails or runs out of its time does
# not stop the next one; the exit code says whether all of them passed.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || {
  echo "on_gpu: $python must have a torch that finds a GPU; PYTHON names another" >&2
  exit 2
}
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
  # Outer LoRA on the attention: with LoRA on 64 experts too, the step that loops over them keeps
  # more activations than 80 GB hold.
  "$python" -m bench.step --device cuda --dtype bfloat16 --preset llada_moe --k 1 2 4 \
    --outer_lora attention --without_naive --repeats 3 --batches 1 --json "$results/step.jsonl"
}

launches() {
  "$python" -m bench.launches --preset llada_moe --k 1 2 3 --json "$results/launches.jsonl"
}

summary() {
  "$python" -m bench.summary "$results" | tee "$results/summary.md"
}

# Seconds that each phase may take: 535 in all.
declare -A limit=(
  [build]=80 [env]=15 [test]=150 [ops]=90 [step]=155 [launches]=35 [summary]=10
)
declare -A function=(
  [build]=build [env]=env_ [test]=test_ [ops]=ops [step]=step [launches]=launches [summary]=summary
)
export -f build env_ test_ ops step launches summary
export python results

failed=()
for phase in "${@:-build env test ops step launches summary}"; do
  for name in $phase; do
    if [[ -z ${limit[$name]:-} ]]; then
      echo "on_gpu: phase must be one of build env test ops step launches summary, got $name" >&2
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
