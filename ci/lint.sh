#!/usr/bin/env bash
# The one list of linters: ci/test.sh, continuous integration and .pre-commit-config.yaml all call this script. Needs a
# git checkout, and on PATH the linters of the extra `test`.
#
#     bash ci/lint.sh [CHECK ...]    # by default all checks; --list prints their names
set -euo pipefail
cd "$(dirname "$0")/.."
checks=(ruff-check ruff-format mypy clang-format workflow-schema workflow-security)

check() {
    case $1 in
    ruff-check) ruff check . ;;
    ruff-format) ruff format --check . ;;
    mypy) run_mypy ;;
    clang-format)
        git ls-files -z 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'docs/*.h' |
            xargs -0 clang-format --dry-run --Werror
        ;;
    workflow-schema) check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml ;;
    workflow-security) zizmor --offline --no-progress --quiet .github/workflows ;;
    *)
        echo "ci/lint.sh: no check $1; there are: ${checks[*]}" >&2
        exit 2
        ;;
    esac
}

# mypy looks for adamops.op_builder in the folder adamops, where only an installation has it.
run_mypy() (
    root=$PWD tree=$(mktemp -d)
    trap 'rm -rf "$tree"' EXIT
    cp -a adamops pyproject.toml "$tree"
    cp -a op_builder "$tree/adamops/op_builder"
    cd "$tree"
    mypy --cache-dir "$root/.mypy_cache" adamops
)

if [[ ${1:-} = --list ]]; then
    printf '%s\n' "${checks[@]}"
    exit
fi
(($#)) || set -- "${checks[@]}"
for name in "$@"; do
    echo "== $name"
    check "$name"
done
