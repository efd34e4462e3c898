#!/usr/bin/env bash
# Clones CALVIN's simulator and its sentences at fixed commits into .venv/src and makes the simulator importable. Run by
# `make calvin`; safe to run again. CALVIN_MIRROR=URL takes the two repositories from another place than GitHub.
set -euo pipefail
cd "$(dirname "$0")/.."
mirror=${CALVIN_MIRROR:-https://github.com/mees}

.venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check -r requirements-calvin.txt
mkdir -p .venv/src
for pinned in calvin_env@797142c588c21e76717268b7b430958dbd13bf48 calvin@fa03f01f19c65920e18cf37398a9ce859274af76; do
    name=${pinned%@*} commit=${pinned#*@} place=.venv/src/${pinned%@*}
    if [ ! -d "$place/.git" ]; then
        # Submodules and large files are of no use here.
        GIT_LFS_SKIP_SMUDGE=1 git clone -q "$mirror/$name" "$place" || {
            echo "error: $mirror/$name cannot be cloned; set CALVIN_MIRROR to a place that has it" >&2
            exit 2
        }
    fi
    git -C "$place" checkout -q "$commit"
done
# Without its own requirements: they ask for a renderer, for gym and for a hash that does not build on Python 3.11.
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps -e .venv/src/calvin_env
echo "CALVIN is installed; try: .venv/bin/python evaluate.py policy=expert benchmark=calvin_abc_d episodes=10"
