#!/usr/bin/env bash
# Proves everything on a GPU within nine minutes and without network:  benchmarks/gpu_all.sh OUT_DIR
#
# Leaves in OUT_DIR, the most telling first, so that a run that is cut off still leaves the checks:
#   summary.txt build.log check.json check.log tests.log results.json bench.log sanitizer.log ops.log
# Needs Python with torch, Triton, numpy, pytest and pybind11, and cmake, ninja and nvcc on the PATH. Builds in build/gpu,
# for the GPU that is there. Without one it builds for ARCH (by default 90), runs what can run, and says what it skipped.
set -uo pipefail

out=${1:?usage: benchmarks/gpu_all.sh OUT_DIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
export python=${PYTHON:-python3}
started=$SECONDS
deadline=${DEADLINE:-540}
failed=0

left() { echo $((deadline - (SECONDS - started))); }

# stage NAME SECONDS COMMAND...: run it, at most so long and within the deadline, its output in OUT_DIR/NAME.log
stage() {
  local name=$1 most=$2 begun=$SECONDS
  shift 2
  ((most > $(left))) && most=$(left)
  if ((most < 5)); then
    echo "$name: not run, the time is up" | tee -a "$out/summary.txt"
    return 1
  fi
  timeout --kill-after=5 "$most" "$@" >"$out/$name.log" 2>&1
  local code=$?
  ((code != 0)) && failed=1
  local how="exit $code"
  ((code == 124)) && how="cut off"
  echo "$name: $how after $((SECONDS - begun)) s" | tee -a "$out/summary.txt"
  return $code
}

build() {
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DMFWM_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$ARCH" \
    -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$($python -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/mfwm_kernels" &&
    cmake --build build/gpu &&
    $python -m mfwm_kernels.info
}
export -f build

# skipped NAME WHY
skipped() { echo "$1: skipped, $2" | tee -a "$out/summary.txt"; }

: >"$out/summary.txt"
if found=$($python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null); then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$out/summary.txt"
  dtype=bf16
else
  echo "no GPU: check and bench run on the CPU, in fp32" | tee -a "$out/summary.txt"
  dtype=fp32
fi
export ARCH=${ARCH:-${found:-90}}
# Nothing else can be done without it, and on two cores it takes four minutes.
if ! stage build 300 bash -c build; then
  tail -30 "$out/build.log"
  exit 1
fi
stage check 110 $python -m mfwm_kernels.check --json "$out/check.json"
grep -E "^FAIL|passed" "$out/check.log" | tail -40
if [[ -n $found ]]; then
  stage tests 90 $python -m pytest -q tests/test_gpu.py
  tail -15 "$out/tests.log"
  bench=(--stop-after "$(($(left) - 130))") ops=()
else
  skipped tests "compiled Triton and CUDA kernels, graphs, streams and devices need a GPU"
  # The rest takes a CPU longer than nine minutes.
  bench=(--only ops --size cpu) ops=(-k "not triton and not compile")
  skipped "bench of training, scaling, rollouts and further sizes" "make bench measures them on a CPU"
  skipped "ops in Triton's interpreter and under torch.compile" "make test runs them on a CPU"
fi
stage bench "$(($(left) - 100))" $python -m benchmarks --budget 0.3 --dtype "$dtype" --out "$out/results.json" "${bench[@]}"
tail -100 "$out/bench.log"
if [[ -z $found ]]; then
  skipped sanitizer "it needs a GPU"
elif ! command -v compute-sanitizer >/dev/null; then
  skipped sanitizer "compute-sanitizer is not on the PATH"
else
  stage sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
    $python -m pytest -q -x tests/test_ops.py -k "cuda and test_values_and_gradients and float32"
  tail -5 "$out/sanitizer.log"
fi
stage ops "$(left)" $python -m pytest -q tests/test_ops.py tests/ops "${ops[@]}"
tail -15 "$out/ops.log"
cat "$out/summary.txt"
exit $failed
