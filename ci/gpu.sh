#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: builds for it, runs all tests including those on the GPU, some of them
# also under compute-sanitizer, benchmarks, and ends with a short table. Exits with status 0 if everything passed.
#
# Needs python3 with torch (a CUDA build) and pytest, nvcc and a C++ compiler; no network. Tests that need more are
# skipped, and pytest says so. Everything is built in a separate folder, and nothing is installed.
#
#   PYTHON        the interpreter (default: python3)
#   ADAMOPS_WORK  the working folder (default: a new one in /tmp, removed at the end)
#   PYTHONPATH    may name folders with more packages, for tests and peers that need them
#   PARTS         which of "gpu-tests benchmark sanitizer all-tests" to run after the build (default: all, in this order)
#
# Arguments are passed to ci/gpu_bench.py, for example --elements 10000000.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$(command -v "${PYTHON:-python3}")" || { echo "ci/gpu.sh: no ${PYTHON:-python3}; name an interpreter in PYTHON" >&2; exit 2; }
if ! "$python" -c 'import torch, pytest' 2>/dev/null; then
  echo "ci/gpu.sh: $python needs torch and pytest; name another interpreter in PYTHON" >&2
  exit 2
fi
if [[ -n "${ADAMOPS_WORK:-}" ]]; then
  mkdir -p "$ADAMOPS_WORK" && work="$(cd "$ADAMOPS_WORK" && pwd)"
else
  work="$(mktemp -d)" && trap 'rm -rf "$work"' EXIT
fi

table=()
failed=0
# run NAME COMMAND...: runs the command, shows its output, and notes its status and last line for the table.
run() {
  local name=$1 start=$SECONDS status
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$work/$name.log"
  status=${PIPESTATUS[0]}
  note "$name" "$status" "$((SECONDS - start)) s" "$(grep -v '^$' "$work/$name.log" | tail -1 | tr -d '=' | xargs -0 | cut -c 1-90)"
  return "$status"
}
note() {
  local verdict=ok
  [[ $2 = 0 ]] || { verdict=FAILED; failed=1; }
  table+=("$(printf '%-18s %-7s %6s  %s' "$1" "$verdict" "$3" "$4")")
}

cd "$work"
export ADAMOPS_CACHE_DIR="$work/cache" ADAMOPS_TEST_CACHE="$work/test-cache" PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
run build "$python" "$root/ci/stage.py" "$work/site"
run device "$python" -c '
import torch
from adamops import op_builder
print("driver and runtime:", op_builder.get("fused_adam").load().status())
assert torch.cuda.is_available(), f"torch {torch.__version__} finds no CUDA device"
print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")'
device=$?

pytest=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -q -p no:cacheprovider)
parts=" ${PARTS:-gpu-tests benchmark sanitizer all-tests} "
wanted() { [[ "$parts" = *" $1 "* ]]; }
if [[ $device = 0 ]]; then
  wanted gpu-tests && run gpu-tests "${pytest[@]}" -m gpu "$root/tests"
  wanted benchmark && run benchmark "$python" "$root/ci/gpu_bench.py" "$@"
  if wanted sanitizer; then
    sanitizer="$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)"
    if [[ -n "$sanitizer" ]]; then
      run sanitizer "$sanitizer" --tool memcheck --error-exitcode 9 --target-processes all \
        "${pytest[@]}" -m gpu "$root/tests/test_gpu.py" -k "test_bits or test_many_tensors or test_amp or test_clipping"
    else
      table+=("$(printf '%-18s %s' sanitizer 'compute-sanitizer was not found')")
    fi
  fi
else
  table+=("$(printf '%-18s %s' 'GPU tests etc.' 'were not run, for want of a device')")
fi
if wanted all-tests; then
  run all-tests "${pytest[@]}" -m "not gpu" "$root/tests"
fi

echo
echo "== Summary"
printf '%s\n' "${table[@]}"
exit "$failed"
