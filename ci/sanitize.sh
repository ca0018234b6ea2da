#!/usr/bin/env bash
# Builds the CPU op with the address and undefined-behaviour sanitizers, in a separate folder, and fuzzes it.
# Arguments are passed to ci/fuzz.py (default: --minutes 5). PYTHON names an interpreter with torch, setuptools,
# pybind11 and py-cpuinfo. SANITIZED_BUILD names the folder (default: build/sanitized). An op built there before is
# reused unless its sources are newer.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${SANITIZED_BUILD:-$PWD/build/sanitized}
# Without recovery, undefined behaviour ends the process, which is a finding.
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
checks="-DPYBIND11_ASSERT_GIL_HELD_INCREF_DECREF"  # which -DNDEBUG leaves out

"$python" setup.py -q build_py --build-lib "$folder/lib"  # the Python files are copied every time
op=$(compgen -G "$folder/lib/adamops/_native/cpu_adam*.so" || true)
if [[ -z $op || -n $(find csrc op_builder -type f ! -name '*.pyc' -newer "$op" -print -quit) ]]; then
    CXX=${CXX:-g++} CXXFLAGS="$sanitizers $checks -fno-omit-frame-pointer -g1" LDFLAGS="$sanitizers" \
        ADAMOPS_BUILD_CPU_ADAM=1 ADAMOPS_BUILD_FUSED_ADAM=0 ADAMOPS_CPU_TARGETS=${ADAMOPS_CPU_TARGETS:-all} \
        "$python" setup.py -q build --build-base "$folder" --build-lib "$folder/lib"
fi

(($#)) || set -- --minutes 5
# Python itself is not built with the sanitizers, so their runtimes must be preloaded.
preload="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so)"
exec env LD_PRELOAD="$preload" ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1" UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH="$folder/lib" "$python" ci/fuzz.py "$@"
