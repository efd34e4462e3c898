#!/usr/bin/env bash
# Installs the original SimplerEnv (sapien 2.2.2, numpy below 2) into .venv-simpler, an interpreter beside .venv, and
# clones the simulator at fixed commits into .venv-simpler/src. Draws with the driver that scripts/setup_simpler.sh
# found or installed. Run by `make simpler-original`; safe to run again.
#   SIMPLER_MIRROR=URL           takes the two repositories from another place than GitHub
#   MS2_REAL2SIM_ASSET_DIR=DIR   scenes and objects that are already here: the clone then leaves out its data folder
set -euo pipefail
cd "$(dirname "$0")/.."
mirror=${SIMPLER_MIRROR:-https://github.com/simpler-env}
place=.venv-simpler

[ -x "$place/bin/python" ] || .venv/bin/python -m venv --without-pip "$place"
.venv/bin/python -m pip --python "$place/bin/python" install -qq --no-compile --disable-pip-version-check \
    -r requirements-simpler-original.txt

mkdir -p "$place/src"
for pinned in ManiSkill2_real2sim@ef7a4d4fdf4b69f2c2154db5b15b9ac8dfe10682 SimplerEnv@4ab7178e83e84ee06894034ec6dbf9e7aad1e882; do
    name=${pinned%@*} commit=${pinned#*@} clone=$place/src/${pinned%@*}
    if [ ! -d "$clone/.git" ]; then
        # Of the files only what the commit needs is fetched, where the other side can do that.
        git clone -q --filter=blob:none --no-checkout "$mirror/$name" "$clone" 2>/dev/null || {
            echo "error: $mirror/$name cannot be cloned; set SIMPLER_MIRROR to a place that has it" >&2
            exit 2
        }
    fi
    # A mirror may lack files that are left out below; without this, git asks for every file of the commit.
    git -C "$clone" config remote.origin.promisor true
    if [ "$name" = ManiSkill2_real2sim ] && [ -n "${MS2_REAL2SIM_ASSET_DIR:-}" ]; then
        git -C "$clone" sparse-checkout set --no-cone '/*' '!/data/' '!/mani_skill2_real2sim/assets/*.glb'
    fi
    git -C "$clone" checkout -q "$commit" || {
        echo "error: the files of $mirror/$name are not all there; set MS2_REAL2SIM_ASSET_DIR to a copy of" \
            "ManiSkill2_real2sim's data folder, remove $clone and run make simpler-original again" >&2
        exit 2
    }
    # Without its own requirements, which are open at the top; ours are installed.
    .venv/bin/python -m pip --python "$place/bin/python" install -qq --disable-pip-version-check --no-deps -e "$clone"
done

[ ! -d .venv/vulkan ] || ln -sfn ../.venv/vulkan "$place/vulkan"
# sapien 3 brings the Vulkan loader along, sapien 2 asks the system for it.
if ! ldconfig -p | grep -q 'libvulkan\.so\.1'; then
    if [ "$(id -u)" = 0 ]; then as_root=(); elif sudo -n true 2>/dev/null; then as_root=(sudo); else as_root=(false); fi
    echo "installing libvulkan1"
    install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libvulkan1)
    "${as_root[@]}" "${install[@]}" >/dev/null 2>&1 || {
        # Not every package list is fresh.
        "${as_root[@]}" apt-get update -qq && "${as_root[@]}" "${install[@]}" >/dev/null
    } || {
        echo "error: run this once, then make simpler-original again: sudo apt-get install -y libvulkan1" >&2
        exit 2
    }
fi
device=$("$place/bin/python" -W ignore -m envs.simpler.sapien2 auto 2>"$place/probe.log" | tail -n 1) || {
    tail -n 1 "$place/probe.log" >&2
    exit 2
}
echo "SimplerEnv is installed and draws with the $device; try:" \
    ".venv/bin/python evaluate.py policy=nothing benchmark=simpler_google_vm episodes=1"
