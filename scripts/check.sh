#!/usr/bin/env bash
# Lint, format and types: what a change must pass before its tests matter. Changes no file.
#
#   bash scripts/check.sh [--fix]         --fix: let ruff repair and format first
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fix=${1:-}
# shellcheck source=scripts/setup.sh
source scripts/setup.sh dev,examples,plot

if [ "$fix" = --fix ]; then
    ruff check --fix-only --quiet .
    ruff format --quiet .
elif [ -n "$fix" ]; then
    echo "check.sh takes --fix or nothing, got '$fix'" >&2
    exit 2
fi

# All three run, so that one call shows everything.
status=0
echo "[check] ruff check" && ruff check . || status=1
echo "[check] ruff format" && ruff format --check . || status=1
echo "[check] mypy --strict syncnorm" && mypy --strict || status=1
if [ $status -ne 0 ]; then echo "[check] FAILED; 'bash scripts/check.sh --fix' repairs what ruff can" >&2; fi
exit $status
