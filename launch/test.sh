#!/usr/bin/env bash
# All tests, after setting up the environment; arguments go to pytest:
#
#     bash launch/test.sh
#     bash launch/test.sh tests/config -k overrides
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

if ! { ruff check --quiet . && ruff format --check --quiet .; }; then
    echo "style: mend with  ruff check --fix . && ruff format ." >&2
    exit 1
fi

# Many tests start two to four processes of their own, so a few workers fill the machine; a file stays on one
# worker, because its tests share fixtures that are slow to make.
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 --dist loadfile "$@"
