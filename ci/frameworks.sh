#!/usr/bin/env bash
# Runs the tests with the training frameworks (tests/frameworks), in a separate environment that has them all. Needs the
# same as ci/test.sh. ADAMOPS_FRAMEWORKS_ENV names the environment's folder (default: .venv-frameworks), PYTHON the
# interpreter. Arguments are passed to pytest; the argument "times" prints step times instead.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${ADAMOPS_FRAMEWORKS_ENV:-.venv-frameworks}

"${PYTHON:-python3}" -m venv --clear "$environment"
python=$PWD/$environment/bin/python
[[ $environment = /* ]] && python=$environment/bin/python
"$python" -m pip install --quiet --upgrade pip setuptools wheel

# The CPU build of torch is enough. DeepSpeed's build needs the torch that it will run with.
"$python" -m pip install --quiet torch==2.13.0
"$python" -m pip install --quiet ninja packaging psutil py-cpuinfo
"$python" -m pip install --quiet --no-build-isolation "deepspeed>=0.19"
"$python" -m pip install --quiet ".[test,frameworks]"

export PATH=$(dirname "$python"):$PATH  # DeepSpeed and torch.compile look for ninja there
if [[ ${1:-} = times ]]; then
    exec "$python" ci/framework_times
fi
exec pytest -m frameworks "$@"  # not python -m pytest, which would import the checkout instead of the package
