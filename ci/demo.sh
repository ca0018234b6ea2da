#!/usr/bin/env bash
# Demonstrates adamops on a fresh machine (Python 3.10+ with venv, a C++ compiler): installs it from this checkout into
# a separate environment, prints the report, and trains a small transformer with it and with torch.optim.AdamW, in turns.
# Takes some four minutes on two cores, and 1.5 GB of disk.
#
#   PYTHON             the interpreter that creates the environment (default: python3)
#   ADAMOPS_DEMO_VENV  the environment's folder (default: .venv-demo in the checkout); it is kept and reused
#
# Arguments are passed to ci/demo.py, for example --steps 100.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${ADAMOPS_DEMO_VENV:-$root/.venv-demo}"
python="${PYTHON:-python3}"
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "ci/demo.sh: $python is missing or older than Python 3.10; name another one in PYTHON" >&2
  exit 1
fi

if [[ ! -x "$venv/bin/python" ]]; then
  echo "== Making the environment $venv"
  "$python" -m venv "$venv"
fi
venv="$(cd "$venv" && pwd)"

# A CPU build of torch is enough. On Linux the default wheel brings several gigabytes of CUDA libraries. A torch that is
# already in the environment (2.4 or later, from the CPU index for example) is kept.
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  echo "== Installing torch 2.13. A CPU build (200 MB) is enough; on Linux pip may fetch one with CUDA libraries (several GB)."
  echo "   To avoid that, stop here (Ctrl-C) and install a CPU build in $venv first, as torch's site says: it is kept."
  "$venv/bin/pip" install --quiet "torch==2.13.0"
fi

echo "== Installing adamops from $root"
"$venv/bin/pip" install --quiet "$root[demo]"

# Leave the checkout: there Python would import the sources instead of the installed package.
cd "$venv"

echo "== Report"
status=0
bin/python -m adamops.report || status=$?
if ((status != 0)); then
  echo "(the report ended with exit status $status: not everything is available natively here)"
fi

echo "== Training"
exec bin/python "$root/ci/demo.py" "$@"
