#!/usr/bin/env bash
# Makes .venv with Python 3.11, installs the pinned packages and, where they are missing, the Debian packages for
# software OpenGL. Run by `make setup`; safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.11}

if ! command -v "$PYTHON" >/dev/null; then
    echo "error: $PYTHON is not installed; install Python 3.11, or say which one: make setup PYTHON=/path/to/python3.11" >&2
    exit 2
fi
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$version" != 3.11 ]; then
    echo "error: $PYTHON is Python $version, this project needs 3.11; make setup PYTHON=/path/to/python3.11" >&2
    exit 2
fi

packages=(libosmesa6 libegl1 libgl1-mesa-dri)
if command -v dpkg-query >/dev/null; then
    missing=()
    for package in "${packages[@]}"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        if [ "$(id -u)" = 0 ]; then as_root=(); elif sudo -n true 2>/dev/null; then as_root=(sudo); else as_root=(false); fi
        if [ "${as_root[*]:-}" = false ]; then
            echo "error: run this once, then make setup again: sudo apt-get install -y ${missing[*]}" >&2
            exit 2
        fi
        echo "installing ${missing[*]}"
        log=$(mktemp)
        # Not every package list is fresh: ask for the packages first, refresh the lists only when that fails.
        if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >"$log" 2>&1; then
            "${as_root[@]}" apt-get update -qq >>"$log" 2>&1 || true
            if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >>"$log" 2>&1; then
                tail -n 5 "$log" >&2
                echo "error: installing ${missing[*]} failed; run: apt-get update && apt-get install -y ${missing[*]}" >&2
                exit 2
            fi
        fi
        rm -f "$log"
    fi
else
    echo "note: not Debian; rendering needs the libraries of ${packages[*]} from your own system's packages" >&2
fi

[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
echo "installing the packages of requirements.txt into .venv (about 4 GB, some minutes)"
# --no-compile: bytecode is made on first import, of the fraction that is ever imported.
.venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check --no-warn-script-location -r requirements.txt
touch .venv/.ready
