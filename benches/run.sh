#!/usr/bin/env bash
# The committed results: peers and our kernels back to back on one GPU.
#
#   benches/run.sh OUT [BACKEND...]
#
# BACKEND: cuda-llvm (the default), cuda-nvrtc, vulkan, wgpu. For each, OUT gets BACKEND.json, the same as a
# table (.md) and as charts (.svg), model-BACKEND.json: a training step, and layer-BACKEND.json: single layers
# beside softmax attention. What is there of an earlier run is removed. Peers need Python
# with torch and flash-linear-attention; without, the rows stand alone. PEERS names the file of a
# peers' run just before. KERNELS_<backend>, MODEL_<backend> and LAYER_<backend> (cuda_llvm, ..) name bench
# binaries that are already built, for machines without cargo; COMMIT what they were built from, if not git's HEAD.
# A back-end that fails is told, the next goes on, and the exit status is 1.
set -euo pipefail
out=${1:?usage: benches/run.sh OUT [BACKEND...]}
shift
[[ $# -gt 0 ]] || set -- cuda-llvm

# sets feature, device and dtype
known() {
    case $1 in
        cuda-llvm) feature=cuda device=cuda dtype=bf16 ;;
        cuda-nvrtc) feature=cuda-cpp device=cuda dtype=bf16 ;;
        vulkan) feature=vulkan device=vulkan dtype=f16 ;;
        wgpu) feature=wgpu device=wgpu dtype=f32 ;;
        *) echo "run.sh: $1: expected cuda-llvm, cuda-nvrtc, vulkan or wgpu" >&2; exit 2 ;;
    esac
}
# before the peers' minutes
for backend in "$@"; do known "$backend"; done

here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
from=$PWD
cd "$here/.."
commit=${COMMIT:-$(git describe --always --dirty --exclude "*" 2>/dev/null || true)}

for backend in "$@"; do
    for name in "$backend" "$backend-roofline" "$backend-lines" "model-$backend" "layer-$backend"; do
        rm -f "$out/$name".{json,md,svg}
    done
done

# a path that was given, from where it was given
given() { case $1 in /*) echo "$1" ;; *) echo "$from/$1" ;; esac; }

peers=()
if [[ -n "${PEERS:-}" ]]; then
    peers=(--peers "$(given "$PEERS")")
else
    rm -f "$out/peers.json"
    python3 "$here/peers.py" "$out/peers.json" || echo "run.sh: the peers' run did not end well"
    # what it measured before is kept
    if [[ -s "$out/peers.json" ]]; then
        peers=(--peers "$out/peers.json")
    else
        echo "run.sh: no peers in this run"
    fi
fi

status=0
bench() { # name of the bench, arguments; of the back-end of the loop below
    local name=$1
    shift
    local binary kernels=KERNELS_${backend//-/_}
    binary=$(tr '[:lower:]' '[:upper:]' <<<"$name")_${backend//-/_}
    local call=(cargo bench --workspace --bench "$name" --features "gla-benches/$feature" --)
    if [[ -n "${!binary:-}" ]]; then
        call=("$(given "${!binary}")" --bench)
    elif [[ -n "${!kernels:-}" ]]; then
        # binaries were given, but none for this
        echo "run.sh: $binary is not set: $name is left out"
        return
    fi
    call+=(--device "$device" --dtype "$dtype" --date "$(date +%F)" --commit "$commit" "$@")
    "${call[@]}" || { echo "run.sh: $name of $backend failed" >&2; status=1; }
}

for backend in "$@"; do
    known "$backend"
    bench kernels "${peers[@]+"${peers[@]}"}" --suite --sweep --catalogue --out "$out/$backend.json"
    bench model "${peers[@]+"${peers[@]}"}" --preset 340M --batch 8 --time 2048 --out "$out/model-$backend.json"
    bench layer --out "$out/layer-$backend.json"
done
exit "$status"
