#!/usr/bin/env bash
# Runs the tests with the training frameworks (tests/frameworks), in an environment of its own that has them all. Needs what
# ci/test.sh needs. ADAMOPS_FRAMEWORKS_ENV names the folder of the environment (.venv-frameworks unless set), PYTHON the
# interpreter. Arguments go to pytest; "times" alone prints step times instead.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${ADAMOPS_FRAMEWORKS_ENV:-.venv-frameworks}

"${PYTHON:-python3}" -m venv --clear "$environment"
python=$PWD/$environment/bin/python
[[ $environment = /* ]] && python=$environment/bin/python
"$python" -m pip install --quiet --upgrade pip setuptools wheel

# The CPU build of torch suffices. DeepSpeed's build asks for the torch that it is to run with.
"$python" -m pip install --quiet torch==2.13.0
"$python" -m pip install --quiet ninja packaging psutil py-cpuinfo
"$python" -m pip install --quiet --no-build-isolation "deepspeed>=0.19"
"$python" -m pip install --quiet ".[test,frameworks]"

export PATH=$(dirname "$python"):$PATH  # DeepSpeed and torch.compile look for ninja there
if [[ ${1:-} = times ]]; then
    exec "$python" ci/framework_times
fi
exec pytest -m frameworks "$@"  # not python -m pytest, which would import the checkout and not what is installed
