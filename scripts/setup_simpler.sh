#!/usr/bin/env bash
# Installs ManiSkill3 for SimplerEnv's WidowX tasks and, where SAPIEN finds no Vulkan device, a private software driver:
# Mesa's lavapipe 25.0.7 from Debian's bookworm-backports, one library under .venv/vulkan. The system's own Mesa stays,
# which MuJoCo and PyBullet render with. Run by `make simpler`; safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$PWD/.venv/vulkan
mesa=mesa-vulkan-drivers=25.0.7-2~bpo12+1

# With the pins of requirements.txt as constraints, pip refuses to move one instead of moving it.
.venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check -r requirements-simpler.txt -c requirements.txt

works() { .venv/bin/python -m envs.simpler.vulkan >/dev/null 2>&1; }

fetch_lavapipe() {
    local root
    root=$(mktemp -d)
    mkdir -p "$root"/{lists,cache,packages}
    chmod 755 "$root" "$root"/*
    # A package list of its own, so that nothing else on the machine is offered a backport.
    # The mirror is the one that this machine's own packages come from.
    local key=/usr/share/keyrings/debian-archive-keyring.gpg from
    from=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | sed -n 's/ bookworm$//p' | head -n 1)
    if [ -z "$from" ]; then
        echo "error: no Vulkan device, and this is not Debian 12, whose backports have a software one; install one" >&2
        exit 2
    fi
    echo "deb [signed-by=$key] $from bookworm-backports main" >"$root/sources.list"
    local apt=(apt-get -qq -o Dir::Etc::sourcelist="$root/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::State::lists="$root/lists" -o Dir::Cache="$root/cache"
        -o Debug::NoLocking=true -o APT::Sandbox::User="$(id -un)")
    (cd "$root/packages" && "${apt[@]}" update && "${apt[@]}" download "$mesa") >"$root/log" 2>&1 || {
        tail -n 3 "$root/log" >&2
        echo "error: $mesa cannot be had from bookworm-backports (see above); try again with a network" >&2
        exit 2
    }
    dpkg-deb -x "$root"/packages/*.deb "$root/unpacked"
    mkdir -p "$place"
    cp "$root/unpacked/usr/lib/x86_64-linux-gnu/libvulkan_lvp.so" "$place/"
    printf '{"ICD":{"api_version":"1.4.305","library_path":"%s"},"file_format_version":"1.0.0"}\n' \
        "$place/libvulkan_lvp.so" >"$place/lavapipe.json"
    rm -rf "$root"
}

# What the driver links against: Debian's own, older mesa-vulkan-drivers depends on the very same packages.
install_libraries() {
    ldd "$place/libvulkan_lvp.so" | grep -q 'not found' || return 0
    if [ "$(id -u)" = 0 ]; then as_root=(); elif sudo -n true 2>/dev/null; then as_root=(sudo); else as_root=(false); fi
    echo "installing mesa-vulkan-drivers, for the libraries it brings"
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq mesa-vulkan-drivers)
    "${as_root[@]}" "${install[@]}" >/dev/null 2>&1 || {
        # Not every package list is fresh.
        "${as_root[@]}" apt-get update -qq && "${as_root[@]}" "${install[@]}" >/dev/null
    } || {
        echo "error: run this once, then make simpler again: sudo apt-get install -y mesa-vulkan-drivers" >&2
        exit 2
    }
}

if ! works; then
    if ! grep -qs 'VERSION_CODENAME=bookworm' /etc/os-release || [ "$(uname -m)" != x86_64 ]; then
        echo "error: SAPIEN finds no Vulkan device; install your system's driver (for a CPU: mesa-vulkan-drivers of" \
            "Mesa 24.3 or later) and run make simpler again" >&2
        exit 2
    fi
    echo "installing a software Vulkan driver into .venv/vulkan"
    fetch_lavapipe
    install_libraries
    works || { .venv/bin/python -m envs.simpler.vulkan; exit 2; }
fi
echo "ManiSkill3 is installed. Set MS_ASSET_DIR to WidowX's scenes, then try:" \
    ".venv/bin/python evaluate.py policy=expert benchmark=simpler_widowx episodes=2"
