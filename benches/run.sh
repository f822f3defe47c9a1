#!/usr/bin/env bash
# The committed results: peers and our kernels back to back on one GPU.
#
#   benches/run.sh OUT [DEVICE] [DTYPE]      OUT: folder for peers.json, rows.json, rows.svg,
#                                              lines.svg, model.json
#
# DEVICE is cuda (default) or vulkan, DTYPE bf16 (default; f16 on vulkan). Peers need Python with torch
# and flash-linear-attention; without, the rows stand alone. KERNELS and MODEL name bench
# binaries that are already built, for machines without cargo.
set -euo pipefail
out=${1:?usage: benches/run.sh OUT [DEVICE] [DTYPE]}
device=${2:-cuda}
dtype=${3:-$([[ "$device" == cuda ]] && echo bf16 || echo f16)}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)

peers=()
if python3 "$here/peers.py" "$out/peers.json"; then
    peers=(--peers "$out/peers.json")
else
    echo "run.sh: no peers in this run"
fi
args=(--device "$device" --dtype "$dtype" --suite --out "$out/rows.json" --svg "$out/rows.svg" --lines "$out/lines.svg" --date "$(date +%F)")
args+=("${peers[@]+"${peers[@]}"}")
model=(--device "$device" --dtype "$dtype" --preset 340M --batch 8 --time 2048 --out "$out/model.json" --date "$(date +%F)")
model+=("${peers[@]+"${peers[@]}"}")
cd "$here/.."
if [[ -n "${KERNELS:-}" ]]; then
    "$KERNELS" --bench "${args[@]}"
else
    cargo bench --workspace --bench kernels --features "gla-benches/$device" -- "${args[@]}"
fi
if [[ -n "${MODEL:-}" ]]; then
    "$MODEL" --bench "${model[@]}"
elif [[ -z "${KERNELS:-}" ]]; then
    cargo bench --workspace --bench model --features "gla-benches/$device" -- "${model[@]}"
fi
