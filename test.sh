#!/usr/bin/env bash
# The one test command: every test and every doctest, on every back-end that is compiled in.
#
#   ./test.sh                                    the default features: CPU, and WGSL through wgpu
#   ./test.sh --features gla-tests/vulkan        with SPIR-V too; likewise gla-tests/cuda
#   ./test.sh -E 'package(gla-burn)'             only what the arguments select, no doctests
#
# Arguments go to `cargo nextest run` (`cargo test` where nextest is not installed). The kernels are
# tested on a software GPU, Mesa's Vulkan driver; on Debian and Ubuntu it is installed if you are
# root. Without a GPU or that driver, the tests that need one are skipped and counted.
set -euo pipefail
cd "$(dirname "$0")"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$HOME/.cache/gla-target}"

# cargo tells what is fresh by time alone: after a build of another checkout into the same folder, older
# sources of this one would pass for built
last="$CARGO_TARGET_DIR/checkout"
if [[ -d "$CARGO_TARGET_DIR" && "$(cat "$last" 2>/dev/null)" != "$PWD" ]]; then
    find . \( -name target -o -name '.?*' \) -prune -o -name '*.rs' -exec touch {} +
fi
mkdir -p "$CARGO_TARGET_DIR"
echo "$PWD" >"$last"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# the Vulkan loader complains without one
if [[ -z "${XDG_RUNTIME_DIR:-}" ]]; then
    mkdir -m 700 "$scratch/runtime"
    export XDG_RUNTIME_DIR="$scratch/runtime"
fi

has_loader() {
    local libraries
    libraries=$(PATH="$PATH:/usr/sbin:/sbin" ldconfig -p 2>/dev/null) || return 1
    [[ "$libraries" == *libvulkan.so* ]]
}

# a driver's file is worth something only with its hardware; Mesa's software driver needs none
has_driver() {
    [[ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ]] && return 0
    local folder files='*.json'
    [[ -e /dev/dri/renderD128 ]] || nvidia-smi -L >/dev/null 2>&1 || files='lvp_icd*.json'
    for folder in /usr/share /usr/local/share /etc; do
        compgen -G "$folder/vulkan/icd.d/$files" >/dev/null && return 0
    done
    return 1
}

has_vulkan() { has_loader && has_driver; }

install_vulkan() {
    echo "test.sh: installing Mesa's software Vulkan (mesa-vulkan-drivers, libvulkan1)"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq </dev/null &&
        apt-get install -qq -y --no-install-recommends mesa-vulkan-drivers libvulkan1 </dev/null
}

if ! has_vulkan && [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
    install_vulkan || echo "test.sh: the installation failed"
fi
if has_vulkan; then
    export GLA_REQUIRE="${GLA_REQUIRE-wgsl,wgpu}"
elif [[ "$(uname -s)" == Linux ]]; then
    echo "test.sh: no Vulkan driver was found: tests that need a GPU will be skipped and counted."
    echo "         Debian, Ubuntu: apt-get install mesa-vulkan-drivers libvulkan1"
    echo "         Fedora: dnf install mesa-vulkan-drivers vulkan-loader"
    echo "         Arch: pacman -S vulkan-swrast vulkan-icd-loader"
fi

# always the whole workspace and all targets: any other selection unifies other features, and cargo
# builds Burn again
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --release --workspace --all-targets "$@"
    report=target/nextest/default/junit.xml
    skipped=$(grep -c 'SKIPPED' "$report" 2>/dev/null) || skipped=${skipped:-0}
else
    cargo test --release --workspace --all-targets "$@" -- --show-output | tee "$scratch/log"
    skipped=$(grep -c 'SKIPPED' "$scratch/log") || skipped=${skipped:-0}
fi
if [[ $# == 0 ]]; then
    cargo test --release --workspace --doc
fi
echo "test.sh: passed; devices and types that tests skipped: $skipped"
