#!/usr/bin/env bash
# Measures which lines and branches of adamops and op_builder the tests run, also in the Python processes that they start.
# Prints those that they do not, and writes coverage.xml. Needs an environment with the extras `test` and `coverage`, and
# the ops built in place (pip install -e ".[test,coverage]").
#
#     bash ci/coverage.sh [ARGUMENTS FOR PYTEST]    # by default those of ci/test.sh
#
# PYTHON names the interpreter (default: python3). Ends with pytest's exit status.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export ADAMOPS_CHECKOUT=$PWD COVERAGE_FILE=$PWD/.coverage
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # processes that tests start import the checkout, too

(($#)) || set -- -n auto --dist worksteal -m "not (frameworks and slow)"
"$python" -m coverage erase
status=0
"$python" -m coverage run -m pytest "$@" || status=$?
"$python" -m coverage combine --quiet
"$python" -m coverage xml --quiet
"$python" -m coverage report
exit "$status"
