#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, torch, nvcc and no network, in nine minutes.
#
#   bench/on_gpu.sh                      every phase
#   bench/on_gpu.sh build test           some of: build env test ops step summary
#   bench/on_gpu.sh rest                 the suite's other models, lengths and shares: a longer call
#
# PYTHON (python3) is the interpreter that has torch; RESULTS_DIR (bench/results/<device>) is where
# the JSON lines, pictures, the tests' log and summary.md go. A phase that fails or runs out of its
# time does not stop the next one; the exit code says whether all of them passed.
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
  "$python" -m bench.run --suite gpu --without step --out "$results"
}

# The suite's first model with every K.
step() {
  "$python" -m bench.run --suite gpu --cases 1 --without ops sweeps --out "$results"
}

rest() {
  "$python" -m bench.run --suite gpu --cases 2 3 4 5 --without ops --out "$results"
}

summary() {
  "$python" -m bench.plot "$results"
}

# Seconds that each phase may take: 535 in all, without the rest.
declare -A limit=(
  [build]=80 [env]=15 [test]=150 [ops]=110 [step]=165 [summary]=15 [rest]=1800
)
declare -A function=(
  [build]=build [env]=env_ [test]=test_ [ops]=ops [step]=step [summary]=summary [rest]=rest
)
export -f build env_ test_ ops step summary rest
export python results

failed=()
for phase in "${@:-build env test ops step summary}"; do
  for name in $phase; do
    if [[ -z ${limit[$name]:-} ]]; then
      echo "on_gpu: phase must be one of build env test ops step summary rest, got $name" >&2
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
