#!/usr/bin/env bash
# Run the tests, one worker for each core; arguments go to pytest:  bash scripts/test.sh [-k name] [tests/unit] [-n 0]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
cd "$ROOT"
# one thread for each process: the workers, and the servers and rounds that tests start, share the cores
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n auto --dist loadgroup --no-loadscope-reorder "$@"
