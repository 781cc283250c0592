#!/usr/bin/env bash
# Run the tests; arguments go to pytest:  bash scripts/test.sh [-k name] [tests/unit]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
cd "$ROOT"
exec python -m pytest "$@"
