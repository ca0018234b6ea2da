#!/usr/bin/env bash
# Tries release wheels as a user would: installs each into a fresh environment without network, compiler or nvcc, shows
# the report, and runs the kernels of every SIMD target, on this CPU and on others that QEMU emulates.
#
#     PYTHONS="python3.11 python3.12" bash ci/try_wheels.sh [FOLDER]
#
# FOLDER (default: dist) holds the wheels from ci/wheel.sh. Each run appends a row for docs/wheels.md to its runs.md.
#   PYTHONS        the interpreters, separated by spaces (default: python3)
#   WHEEL_TORCH    the torch to install (default: torch==2.13.0, which for most Pythons brings several GB of CUDA
#                  libraries, and for AArch64 under QEMU torch==2.9.1, which has none). Empty for none: then only what
#                  needs no torch is tried
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
out=$(cd "${1:-dist}" && pwd)
light=(filelock platformdirs) # what adamops needs besides torch
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fresh=$work/fresh house=$work/house
mkdir "$work/home"

offline=()
if unshare -rn true 2>/dev/null; then
    offline=("$(command -v unshare)" -rn)
else
    echo "this system does not allow a process without network; pip has no index all the same"
fi
# Runs a command in the fresh environment, with nothing else on PATH, no index for pip, and no network.
alone() {
    (cd "$work/home" && env -i HOME="$PWD" PATH="$fresh/bin" PIP_NO_INDEX=1 PIP_CONFIG_FILE=/dev/null "${offline[@]}" "$@")
}

# The CPUs that QEMU plays. It is slow at the pointer authentication of the architecture, so not at that of `max`.
declare -A cpus=(
    [x86_64]="Nehalem SandyBridge Haswell Skylake-Server EPYC Haswell,-xsave"
    [aarch64]="cortex-a53 neoverse-n1 max,pauth-impdef=on"
)

for python in ${PYTHONS:-python3}; do
    read -r tag machine <<<"$("$python" -c \
        'import platform, sys; print("cp%d%d" % sys.version_info[:2], platform.machine())')"
    wheel=$(ls "$out"/adamops-*-"$tag"-*_"$machine".whl)
    emulator=() emulated=() torch=torch==2.13.0
    if [[ $machine = "$(uname -m)" ]]; then
        emulator=("qemu-$machine")
    else # the interpreter is a script that starts QEMU
        emulated=("neoverse-n1 (QEMU)") torch=torch==2.9.1
    fi
    if [[ $tag = cp315 ]]; then
        torch="" # only torch 2.15 has wheels for it
    fi
    torch=${WHEEL_TORCH-$torch}
    printf '\n== %s in a fresh environment\n' "$(basename "$wheel")"
    rm -rf "$house"
    "$python" -m venv --clear "$fresh"
    "$fresh/bin/pip" install -q --upgrade pip
    if [[ $torch ]]; then
        "$fresh/bin/pip" download -q -d "$house" "$torch" "$wheel"
        alone "$fresh/bin/pip" install -q --find-links "$house" "$wheel"
        alone "$fresh/bin/pip" check
        alone "$fresh/bin/python" -m adamops.report
        alone "$fresh/bin/python" "$here/ci/smoke.py" "${emulated[@]}" | tee -a "$out/runs.md"
    else
        "$fresh/bin/pip" download -q -d "$house" "${light[@]}"
        alone "$fresh/bin/pip" install -q --find-links "$house" "${light[@]}"
        alone "$fresh/bin/pip" install -q --no-deps "$wheel"
        alone "$fresh/bin/python" -m adamops.report || echo "(as there is no torch)"
    fi

    extension=$(echo "$fresh"/lib/python*/site-packages/adamops/_native/cpu_adam.*.so)
    check=("$(readlink -f "$fresh/bin/python")" -S "$here/tests/kernel_check.py" "$extension")
    for target in $(alone "${check[@]}" | sed -n 's/^supported: //p'); do
        alone "${check[@]}" "$target" | tail -n 1
    done
    name=$(basename "$wheel" | cut -d- -f1,2 --output-delimiter=' ')
    name="$name $(sed -n 's/^Tag: //p' "$fresh"/lib/python*/site-packages/adamops-*.dist-info/WHEEL | head -n 1)"
    version=$("$fresh/bin/python" -c 'import platform; print(platform.python_version())')
    if ! command -v "qemu-$machine" >/dev/null; then
        echo "no qemu-$machine (Debian package qemu-user): other CPUs are not tried"
        continue
    fi
    for cpu in ${cpus[$machine]}; do
        found=$(QEMU_CPU=$cpu "${emulator[@]}" "${check[@]}" 2>"$work/log") || { cat "$work/log" >&2; exit 1; }
        target=$(tail -n 1 <<<"$found" | cut -d' ' -f1)
        echo "| $name | $version | none | $cpu (QEMU) | $target | kernels |" | tee -a "$out/runs.md"
    done
done
