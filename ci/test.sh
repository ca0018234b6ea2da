#!/usr/bin/env bash
# Runs the linters, and the tests against the installed package, in a separate environment. Needs Python 3.10+ with venv
# and a C++ compiler. ADAMOPS_TEST_ENV names the environment's folder (default: .venv-test), which is made anew, PYTHON
# the interpreter. With --install-packages as the first argument, packages of the system that some tests need are
# installed if they are missing (apt-get, as root). The other arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${ADAMOPS_TEST_ENV:-.venv-test}
install_packages=
if [[ ${1-} == --install-packages ]]; then
    install_packages=yes
    shift
fi

if [[ -e $environment && ! -f $environment/pyvenv.cfg ]]; then
    echo "ci/test.sh: $environment is there, and is no virtual environment; name another folder in ADAMOPS_TEST_ENV" >&2
    exit 1
fi
"${PYTHON:-python3}" -m venv --clear "$environment"
python=$PWD/$environment/bin/python
[[ $environment = /* ]] && python=$environment/bin/python
"$python" -m pip install --quiet --upgrade pip

# The CPU build of torch is enough; a plain `torch` may bring several GB of CUDA libraries.
"$python" -m pip install --quiet torch==2.13.0
"$python" -m pip install --quiet ".[test,demo,docs]"

# The tests on other CPUs need QEMU's user emulation, a cross compiler and Clang; without them they are skipped.
packages=()
command -v qemu-x86_64 >/dev/null || packages+=(qemu-user)
command -v aarch64-linux-gnu-g++ >/dev/null || packages+=(g++-aarch64-linux-gnu)
command -v clang++ >/dev/null || packages+=(clang)
if ((${#packages[@]})) && [[ $install_packages ]]; then
    (apt-get update -qq && apt-get install -y -qq "${packages[@]}") >/dev/null 2>&1 ||
        echo "${packages[*]} could not be installed: tests that need them are skipped"
elif ((${#packages[@]})); then
    echo "Without ${packages[*]}, tests on other CPUs are skipped; --install-packages installs them (Debian, as root)"
fi

bin=$(dirname "$python")
PATH=$bin:$PATH bash ci/lint.sh

(cd / && "$python" -m adamops.report)
# Slow framework tests, and tests with frameworks other than torch, are left to ci/frameworks.sh.
exec "$bin/pytest" -n auto --dist worksteal -m "not (frameworks and slow)" "$@"
