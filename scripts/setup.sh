#!/usr/bin/env bash
# Makes the virtual environment that the other scripts run in, with syncnorm in it (editable). A second call is instant.
#
#   bash scripts/setup.sh [extras]        extras: a comma list, default "dev,examples,plot"
#   source scripts/setup.sh [extras]      the same, and puts the environment's python first on PATH
#
# SYNCNORM_VENV         where it lies (default .venv in the checkout)
# SYNCNORM_PYTHON       the Python to make it from (default: the newest of python3, python3.13 ... python3.10 that serves)
# SYNCNORM_TORCH_INDEX  a package index to take torch from, for example https://download.pytorch.org/whl/cpu
#                       where there is no GPU (a far smaller download). Opt-in: many networks do not reach that host.

_syncnorm_say() { printf '[setup] %s\n' "$*"; }

_syncnorm_timed() { # what it says, then the command; the command's output appears only if it fails
    local what=$1 began=$SECONDS log
    shift
    log=$(mktemp)
    _syncnorm_say "$what ..."
    if "$@" >"$log" 2>&1; then
        _syncnorm_say "$what: done in $((SECONDS - began)) s"
        rm -f "$log"
    else
        cat "$log" >&2
        rm -f "$log"
        _syncnorm_say "$what: FAILED after $((SECONDS - began)) s. The output is above." >&2
        return 1
    fi
}

_syncnorm_serves() { # is this command a Python that we support?
    "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

_syncnorm_python() { # prints the Python to build from
    local candidate
    for candidate in ${SYNCNORM_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if _syncnorm_serves "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    _syncnorm_say "syncnorm needs Python >= 3.10; found $("${SYNCNORM_PYTHON:-python3}" --version 2>&1 | head -n 1)." \
        "Install a newer one, or name it: SYNCNORM_PYTHON=/path/to/python3.12 bash scripts/setup.sh" >&2
    return 1
}

_syncnorm_make_venv() { # python, folder
    if [ -e "$2" ] && [ ! -f "$2/pyvenv.cfg" ] && [ -n "$(ls -A "$2")" ]; then
        echo "SYNCNORM_VENV must name a virtual environment, an empty folder or none; $2 holds something else and stays as it is."
        return 1
    fi
    # Debian ships venv without ensurepip; then pip, run from outside, installs itself into the new environment.
    "$1" -m venv --clear "$2" ||
        { "$1" -m venv --clear --without-pip "$2" && "$1" -m pip --python "$2/bin/python" install pip; }
}

_syncnorm_setup() { # extras
    local root venv stamp python wanted had fingerprint
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    venv=${SYNCNORM_VENV:-$root/.venv}
    stamp=$venv/.syncnorm-setup # line 1: fingerprint, line 2: the extras that are in

    wanted=${1:-dev,examples,plot}
    fingerprint=$(cd "$root" && echo "$root" | cat - pyproject.toml constraints.txt syncnorm/kernels/native/*.{cpp,h,py} | cksum)
    if [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$fingerprint" ]; then
        had=$(sed -n 2p "$stamp")
        if _syncnorm_covers "$had" "$wanted" && "$venv/bin/python" -c 'import torch' 2>/dev/null; then
            _syncnorm_say "environment in $venv is up to date ($had)"
            return
        fi
        wanted=$had,$wanted
    fi
    wanted=$(tr ',' '\n' <<<"$wanted" | sort -u | grep . | paste -sd ,)

    if ! _syncnorm_serves "$venv/bin/python"; then
        python=$(_syncnorm_python) || return 1
        _syncnorm_timed "virtual environment in $venv from $("$python" --version)" _syncnorm_make_venv "$python" "$venv" || return 1
    fi

    # torch first and alone: it is the large one, and the one that may come from an index of its own.
    local -a torch=(-m pip install --disable-pip-version-check -c "$root/constraints.txt" torch)
    if [ -n "${SYNCNORM_TORCH_INDEX:-}" ]; then torch+=(--index-url "$SYNCNORM_TORCH_INDEX"); fi
    _syncnorm_timed "torch (large: the first time can take minutes)" "$venv/bin/python" "${torch[@]}" || return 1
    _syncnorm_timed "syncnorm with [$wanted]" \
        "$venv/bin/python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" -e "$root[$wanted]" || return 1
    "$venv/bin/python" -c 'import torch; print(f"[setup] torch {torch.__version__}, {torch.cuda.device_count()} GPUs")' || return 1
    # Optional: without a compiler, torch's own operators serve, and syncnorm.explain says so.
    _syncnorm_timed "native operators" "$venv/bin/python" -m syncnorm build ||
        _syncnorm_say "native operators: not built; torch's own operators will serve"
    printf '%s\n%s\n' "$fingerprint" "$wanted" >"$stamp"
}

_syncnorm_covers() { # does the comma list $1 hold every item of $2?
    local item
    for item in ${2//,/ }; do
        [[ ",$1," == *",$item,"* ]] || return 1
    done
}

if _syncnorm_setup "$@"; then
    if [ "${BASH_SOURCE[0]}" != "$0" ]; then
        PATH=$(cd "${SYNCNORM_VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}" && pwd)/bin:$PATH
        export PATH
    fi
else
    # shellcheck disable=SC2317  # reached when run, not sourced
    return 1 2>/dev/null || exit 1
fi
