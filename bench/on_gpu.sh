#!/usr/bin/env bash
# Brings the evidence of a GPU home from a short time on one: a machine with torch, nvcc, no network.
#
#   bench/on_gpu.sh first                all that may be wrong, in 270 s
#   bench/on_gpu.sh second               all that is to be measured, in 400 s
#   bench/on_gpu.sh build smoke          some phases, in this order (PHASES below)
#
# RESULTS_DIR (bench/results/<device>) gets at most 8 files: rows of smoke, ops and step, failures.txt,
# log.txt, profile.txt, pictures.tar.gz and summary.md. Each phase has a limit of its own and a share of
# the whole that no other can take; what a phase that is cut off had found by then is in the files. The
# library is built in the background from second 0. A short table comes last; the exit code is 1 where
# a phase failed, which is named.
#
# PYTHON (python3) is the interpreter that has torch. DEVICE=cpu tries the script without a GPU, LIMITS
# ("smoke=5 tests=20") sets limits in seconds, TESTS the tests of the phase `tests`.
# `python -m bench.land FOLDER` puts what came home into the repository.
set -uo pipefail
cd "$(dirname "$0")/.."

PHASES="build env smoke gpu_step step compiled tests ops step_table race profile rest summary"
# Seconds: 270 of the first run and 397 of the second, the build beside them.
declare -A limit=(
  [build]=200 [env]=12 [smoke]=60 [gpu_step]=40 [step]=70 [compiled]=25 [tests]=55 [ops]=110
  [step_table]=130 [race]=40 [profile]=40 [rest]=1800 [summary]=8
)
declare -A run_of=(
  [first]="env smoke gpu_step step compiled tests summary"
  [second]="env tests ops step_table race profile summary"
)

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
if [[ $device == cuda ]]; then
  name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || {
    echo "on_gpu: $python must have a torch that finds a GPU; PYTHON names another" >&2
    exit 2
  }
else
  name=$device
fi
asked=()
for word in "${@:-first}"; do
  if [[ -n ${run_of[$word]:-} ]]; then
    asked+=(build ${run_of[$word]})
  elif [[ " $PHASES " == *" $word "* ]]; then
    asked+=("$word")
  else
    echo "on_gpu: phase must be first, second or one of $PHASES, got $word" >&2
    exit 2
  fi
done
for setting in ${LIMITS:-}; do
  if [[ ! $setting =~ ^([a-z_]+)=([0-9]+)$ || -z ${limit[${BASH_REMATCH[1]}]:-} ]]; then
    echo "on_gpu: LIMITS must be PHASE=SECONDS with one of $PHASES, got $setting" >&2
    exit 2
  fi
  limit[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
done

results=${RESULTS_DIR:-bench/results/$name}
mkdir -p "$results"
results=$(cd "$results" && pwd)
log=$results/log.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
# The package is run where it lies: nothing has to be installed.
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
# One for all: a kernel that a phase compiled is not compiled by the next.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
# nvcc may lie where no PATH leads.
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

if [[ $device == cuda ]]; then
  smoke_suite=smoke ops_suite=gpu test_workers=14
  step_case=(--model LLaDA-MoE-7B-A1B --batch_size 2 --length 4096 --prompt_share 0.9
    --outer lora_attention --dtype bfloat16)
else
  smoke_suite=tiny ops_suite=quick test_workers=2
  step_case=(--model tiny --batch_size 2 --length 64 --prompt_share 0.8)
fi

build() {
  local capability=${CUDAARCHS:-}
  if [[ $device == cuda ]]; then
    capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    export MEMDLM_CUDA=ON MEMDLM_CPU_OPS=OFF
  fi
  # Only for this GPU, and without the CPU's ops: minutes less of compiling.
  CUDAARCHS=$capability "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index \
    --target "$scratch/built" . &&
    cp --remove-destination "$scratch"/built/memdlm_kernels/*.so memdlm_kernels/
}

env_() {
  if [[ $device == cuda ]]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  fi
  "$python" -m memdlm.cli env
}

smoke() {
  "$python" -m bench.smoke --device "$device" --suite "$smoke_suite" --ops triton \
    --rows "$results/smoke.jsonl"
}

gpu_step() {
  run_tests -n 4 tests/gpu/test_step.py
}

step() {
  "$python" -m bench.step "${step_case[@]}" --device "$device" --k 2 --without_naive --without_exact \
    --repeats 2 --json "$results/step.jsonl"
}

# SGD, reset and the derivative, at LLaDA2.x-mini's size: as soon as the build is there.
compiled() {
  while [[ -e $scratch/building ]]; do sleep 0.2; done
  "$python" -m bench.smoke --device "$device" --suite "$smoke_suite" --ops compiled \
    --rows "$results/smoke.jsonl"
}

tests() {
  if [[ -n ${TESTS:-} ]]; then
    run_tests -n "$test_workers" $TESTS
  else
    run_tests -n "$test_workers" -m first tests/kernels tests/gpu
  fi
}

# A test's limit needs pytest-timeout: without it, the phase's limit alone holds.
run_tests() {
  local timeout=()
  "$python" -c 'import pytest_timeout' 2>/dev/null && timeout=(--timeout 30)
  "$python" -m pytest -q -p no:cacheprovider -p tests.failures "${timeout[@]}" \
    --failures "$results/failures.txt" "$@"
}

ops() {
  "$python" -m bench.run --suite "$ops_suite" --without step --out "$results"
}

# The suite's first model with every K.
step_table() {
  "$python" -m bench.run --suite gpu --cases 1 --without ops sweeps --out "$results"
}

# Probabilities of half the width are written over logits that other threads still read.
race() {
  compute-sanitizer --tool racecheck --error-exitcode 1 "$python" -m pytest -q -p no:cacheprovider \
    -p tests.failures --failures "$results/failures.txt" -k "test_sizes and bfloat16 and triton" \
    tests/kernels/test_masked_linear_cross_entropy.py tests/kernels/test_masked_linear_kl.py
}

profile() {
  local counters=()
  if command -v ncu >/dev/null; then
    counters=(ncu --clock-control none --section SpeedOfLight --section Occupancy --section LaunchStats
      --kernel-name 'regex:swiglu_forward_kernel|forward_tile_kernel|sgd' --launch-count 6)
  fi
  "$python" -m bench.profile_kernels --device "$device" --suite "$smoke_suite" |
    tee "$results/profile.txt"
  if ((${#counters[@]})); then
    "${counters[@]}" "$python" -m bench.profile_kernels --device "$device" --suite "$smoke_suite" \
      --bare | tee -a "$results/profile.txt"
  fi
}

rest() {
  "$python" -m bench.run --suite gpu --cases 2 3 4 5 --without ops --out "$results"
}

summary() {
  "$python" -m bench.plot "$results" &&
    tar -czf "$results/pictures.tar.gz" -C "$results" $(cd "$results" && ls | grep '\.png$') &&
    rm -f "$results"/*.png
}

declare -fx build env_ smoke gpu_step step compiled tests run_tests ops step_table race profile rest \
  summary
export python device results scratch smoke_suite ops_suite test_workers

# All that a phase started is told to stop 2 seconds before its limit, and killed at it. The shell
# outlives the first signal (its trap), so that there is somebody to wait for.
run_phase() {
  local phase=$1 function=$1
  [[ $phase == env ]] && function=env_
  timeout -k 2 "$((limit[$phase] > 3 ? limit[$phase] - 2 : 1))" \
    bash -c "trap : TERM; $(declare -p step_case); set -uo pipefail; $function"
}

failed=() table=()
report() { # PHASE SECONDS STATUS
  local word=passed
  case $3 in
    0) ;;
    124 | 137) word="cut off at its limit of ${limit[$1]} s" ;;
    *) word="failed with status $3" ;;
  esac
  (($3)) && failed+=("$1")
  table+=("$(printf '%-12s%5s s  %s' "$1" "$2" "$word")")
}

building=
for phase in "${asked[@]}"; do
  if [[ $phase == build ]]; then
    touch "$scratch/building"
    (
      SECONDS=0
      run_phase build >"$scratch/build.log" 2>&1
      echo "$SECONDS $?" >"$scratch/build.result"
      rm -f "$scratch/building"
    ) &
    building=$!
    continue
  fi
  begin=$SECONDS
  echo "== $phase" | tee -a "$log"
  run_phase "$phase" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  report "$phase" $((SECONDS - begin)) "$status"
  echo "== ${table[-1]}" | tee -a "$log"
done
if [[ -n $building ]]; then
  wait "$building"
  read -r seconds status <"$scratch/build.result"
  report build "$seconds" "$status"
  { echo "== build"; cat "$scratch/build.log"; } >>"$log"
  ((status)) && tail -n 20 "$scratch/build.log"
fi

echo "== $name: $results"
printf '%s\n' "${table[@]}" | tee -a "$log"
if ((${#failed[@]})); then
  echo "on_gpu: failed: ${failed[*]}" >&2
  exit 1
fi
