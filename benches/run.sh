#!/usr/bin/env bash
# The committed results: peers and our kernels back to back on one GPU.
#
#   benches/run.sh OUT [BACKEND...]
#
# BACKEND: cuda-llvm (the default), cuda-nvrtc, vulkan, wgpu. For each, OUT gets BACKEND.json, the same as a
# table (.md) and as charts (.svg), and model-BACKEND.json: a training step. Peers need Python
# with torch and flash-linear-attention; without, the rows stand alone. PEERS names the file of a
# peers' run just before. KERNELS_<backend> and MODEL_<backend> (cuda_llvm, ..) name bench binaries that are
# already built, for machines without cargo. A back-end that fails is told, the next goes on, and the exit
# status is 1.
set -euo pipefail
out=${1:?usage: benches/run.sh OUT [BACKEND...]}
shift
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
from=$PWD
cd "$here/.."

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
bench() { # binary or empty, name of the bench, feature, arguments
    local binary=$1 name=$2 feature=$3
    shift 3
    local call=(cargo bench --workspace --bench "$name" --features "gla-benches/$feature" --)
    [[ -n "$binary" ]] && call=("$(given "$binary")" --bench)
    "${call[@]}" "$@" || { echo "run.sh: $name of $feature failed" >&2; status=1; }
}

[[ $# -gt 0 ]] || set -- cuda-llvm
for backend in "$@"; do
    case $backend in
        cuda-llvm) feature=cuda device=cuda dtype=bf16 ;;
        cuda-nvrtc) feature=cuda-cpp device=cuda dtype=bf16 ;;
        vulkan) feature=vulkan device=vulkan dtype=f16 ;;
        wgpu) feature=wgpu device=wgpu dtype=f32 ;;
        *) echo "run.sh: $backend: expected cuda-llvm, cuda-nvrtc, vulkan or wgpu" >&2; exit 2 ;;
    esac
    kernels=KERNELS_${backend//-/_} model=MODEL_${backend//-/_}
    args=(--device "$device" --dtype "$dtype" --date "$(date +%F)" "${peers[@]+"${peers[@]}"}")
    bench "${!kernels:-}" kernels "$feature" "${args[@]}" --suite --sweep --catalogue --out "$out/$backend.json"
    # binaries were given, but none for this
    if [[ -n "${!kernels:-}" && -z "${!model:-}" ]]; then
        echo "run.sh: $model is not set: no training step"
        continue
    fi
    bench "${!model:-}" model "$feature" "${args[@]}" --preset 340M --batch 8 --time 2048 --out "$out/model-$backend.json"
done
exit "$status"
