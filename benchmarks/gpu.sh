#!/usr/bin/env bash
# The runs of `mergequant bench` that docs/results.md quotes, on one NVIDIA H200: about five minutes of GPU time.
#
#     benchmarks/gpu.sh               # the two of the document
#     benchmarks/gpu.sh qwen3-8b      # one shape
#
# `python benchmarks/render.py` then puts them into the document.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

declare -A options=(
    [llama-2-7b]="--phases memory,gemm,prefill,decode,e2e"
    [llama-3-8b]="--phases memory,prefill,decode --batch 1,16 --context 2048 --kv 8,4"
    # Not in the document: norms of heads, and very wide layers.
    [qwen3-8b]="--phases memory,prefill,decode --batch 1,16 --context 2048 --kv 8,4"
    [llama-2-70b-layer]="--phases gemm,prefill,decode --batch 1,16 --context 2048 --kv 8,4"
)

[ $# -gt 0 ] || set -- llama-2-7b llama-3-8b
for shape in "$@"; do
    # The last line is the JSON document, which the file has as well.
    # shellcheck disable=SC2086  # options are words
    "$python" -m mergequant bench "$shape" ${options[$shape]} --json "benchmarks/results/bench_$shape.json" | sed '$d'
done
"$python" benchmarks/tune_elementwise.py --json benchmarks/results/elementwise.json
"$python" benchmarks/tune_kv.py --json benchmarks/results/kv_attention.json
