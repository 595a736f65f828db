#!/usr/bin/env bash
# Sets up and passes the tests: at most 10 minutes on 2 cores.
#
#   bash scripts/test.sh [pytest arguments]       for example: -m "not gloo", -k mutants, -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=("$@")
# shellcheck source=scripts/setup.sh
source scripts/setup.sh dev,examples,plot

# One thread a process: the rank tests start several, and more threads than cores make them slower, not faster.
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 --dist worksteal ${arguments[@]+"${arguments[@]}"}
