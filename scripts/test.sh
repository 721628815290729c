#!/usr/bin/env bash
# What:  all tests, style included.
# Needs: Python 3.11+; sets up .venv by itself. Real data in ../shared/data is used where it is there.
# Gives: pytest's report; arguments go to pytest, e.g. scripts/test.sh tests/test_losses.py
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
set_up_python requirements-dev.txt
# a file stays in one process, since its tests share runs
exec "$PYTHON" -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
