#!/usr/bin/env bash
# Tries release wheels with several releases of torch: installs each into a fresh environment and runs ci/smoke.py
# there, with nothing else on PATH.
#
#     bash ci/torch_matrix.sh [FOLDER [PYTHON=TORCH ...]]
#
# FOLDER (default: dist) holds the wheels from ci/wheel.sh. Each run appends a row to its runs.md. Every CUDA build of
# torch takes several GB and minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(cd "${1:-dist}" && pwd)
shift || true
runs=("$@")
((${#runs[@]})) || runs=(python3=2.13.0 python3=2.14.1 python3=2.4.1)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for run in "${runs[@]}"; do
    python=${run%%=*} torch=${run##*=}
    tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    printf '\n== %s with torch %s\n' "$tag" "$torch"
    "$python" -m venv --clear "$work/environment"
    "$work/environment/bin/pip" install -q --upgrade pip
    # setuptools: some releases of torch import it without declaring it.
    "$work/environment/bin/pip" install -q setuptools "torch==$torch" "$(ls "$out"/adamops-*-"$tag"-*.whl)"
    env -i HOME="$work" PATH="$work/environment/bin" "$work/environment/bin/python" ci/smoke.py | tee -a "$out/runs.md"
done
