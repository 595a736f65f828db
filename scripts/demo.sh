#!/usr/bin/env bash
# The main job, on real data: handwritten digits on 2 processes at 2 samples each, with local BN, syncnorm and GroupNorm.
# At most 2 minutes after the install. Ends with a table; writes outputs/demo.csv and outputs/demo.png.
#
#   bash scripts/demo.sh [--ranks 4] [--seeds 3] [--small] ...      bash scripts/demo.sh --help lists them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=("$@")
# shellcheck source=scripts/setup.sh
source scripts/setup.sh examples,plot
exec python -m syncnorm demo ${arguments[@]+"${arguments[@]}"}
