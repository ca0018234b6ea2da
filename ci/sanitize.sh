#!/usr/bin/env bash
# Builds the CPU op with the address and undefined-behaviour sanitizers, in a separate folder, and fuzzes it.
# Arguments are passed to ci/fuzz.py (default: --minutes 5). With SANITIZER=thread it is built with the thread sanitizer,
# and offloaded optimizers step beside the backward pass; arguments are passed to pytest. PYTHON names an interpreter with
# torch, setuptools, pybind11 and py-cpuinfo (and pytest). SANITIZED_BUILD names the folder (default: build/sanitized, or
# build/sanitized-thread). An op built there before is reused unless its sources are newer.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
sanitizer=${SANITIZER:-address}
if [[ $sanitizer == thread ]]; then
    folder=${SANITIZED_BUILD:-$PWD/build/sanitized-thread}
    sanitizers="-fsanitize=thread"
else
    folder=${SANITIZED_BUILD:-$PWD/build/sanitized}
    # Without recovery, undefined behaviour ends the process, which is a finding.
    sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
fi
checks="-DPYBIND11_ASSERT_GIL_HELD_INCREF_DECREF"  # which -DNDEBUG leaves out

"$python" setup.py -q build_py --build-lib "$folder/lib"  # the Python files are copied every time
op=$(compgen -G "$folder/lib/adamops/_native/cpu_adam*.so" || true)
if [[ -z $op || -n $(find csrc op_builder -type f ! -name '*.pyc' -newer "$op" -print -quit) ]]; then
    CXX=${CXX:-g++} CXXFLAGS="$sanitizers $checks -fno-omit-frame-pointer -g1" LDFLAGS="$sanitizers" \
        ADAMOPS_BUILD_CPU_ADAM=1 ADAMOPS_BUILD_FUSED_ADAM=0 ADAMOPS_CPU_TARGETS=${ADAMOPS_CPU_TARGETS:-all} \
        "$python" setup.py -q build --build-base "$folder" --build-lib "$folder/lib"
fi

if [[ $sanitizer == thread ]]; then
    # One thread an update: the sanitizer does not see how OpenMP's runtime orders its threads. Python and torch are not
    # built with it, but it sees their locks.
    root=$PWD
    cd "$folder"  # not where adamops lies: python -m would take that one
    exec env LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libtsan.so)" OMP_NUM_THREADS=1 ADAMOPS_NUM_THREADS=1 \
        TSAN_OPTIONS="halt_on_error=1 exitcode=66 history_size=7 ignore_noninstrumented_modules=1" \
        ADAMOPS_TEST_SCHEDULES="${ADAMOPS_TEST_SCHEDULES:-200}" PYTHONPATH="$folder/lib" \
        setarch -R "$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" "$root/tests/test_offload.py" -k any_schedule "$@"
fi
(($#)) || set -- --minutes 5
# Python itself is not built with the sanitizers, so their runtimes must be preloaded.
preload="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so)"
exec env LD_PRELOAD="$preload" ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1" UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH="$folder/lib" "$python" ci/fuzz.py "$@"
