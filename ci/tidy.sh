#!/usr/bin/env bash
# Runs clang-tidy, with the checks of .clang-tidy, over the C++ sources of the ops, each with the flags of every SIMD target
# that it is compiled for. Needs a C++ compiler, pybind11, and clang-tidy (in the extra `dev`) on PATH.
#
#   PYTHON               the interpreter whose headers are used (default: python3)
#   ADAMOPS_CPU_TARGETS  fewer SIMD targets (default: all)
#
# Arguments are passed to clang-tidy, for example --fix.
set -euo pipefail
cd "$(dirname "$0")/.."
export ADAMOPS_CPU_TARGETS=${ADAMOPS_CPU_TARGETS:-all}

sources=$("${PYTHON:-python3}" ci/compile_commands.py)
printf '%s\n' "$sources" | xargs -P "${MAX_JOBS:-$(nproc)}" -n 1 clang-tidy -p . --quiet "$@"
