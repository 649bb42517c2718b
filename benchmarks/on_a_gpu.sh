#!/usr/bin/env bash
# What only a GPU can tell, in at most ten minutes, the most wanted first:
#
#     benchmarks/on_a_gpu.sh [cuda|cpu] [results]
#
# Each line of JSON is printed, and appended to the file `results` with the name of its step; the last line sums up. A step that
# fails or exceeds its time does not stop the next. With `cpu`, sizes are tiny: that shows that the steps run, and measures nothing;
# only the ten minutes limit it.
# PYTHON is the interpreter, with the packages of pyproject.toml but Ray and MLflow.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
device=${1:-cuda}
results=${2:-work/on_a_gpu.jsonl}
python=${PYTHON:-python3}
budget=580
statuses=()
log=$(mktemp)
trap 'rm -f "$log"' EXIT
mkdir -p "$(dirname "$results")"
export PYTHONUNBUFFERED=1

# step <name> <most seconds> <arguments of python>...
step() {
    local name=$1 limit=$2 left=$((budget - SECONDS)) status
    shift 2
    [[ $device == cuda ]] && ((limit <= left)) || limit=$left
    if ((limit < 5)); then
        statuses+=("\"$name\": \"no time left\"")
        return
    fi
    echo "== $name, at most $limit s: $*"
    timeout -k 5 "$limit" "$python" "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    sed -n "s/^{/{\"step\": \"$name\", /p" "$log" >>"$results"
    statuses+=("\"$name\": $status")
}

train=(benchmarks/train_step.py --device "$device" --no-online)
extraction=(benchmarks/extraction.py --device "$device" --precision bfloat16)
if [[ $device == cuda ]]; then
    train+=(--batch-size 256 --images 4096 --threads 14 --steps 20 --rounds 3)
    extraction+=(--teacher dinov2/vitb14 --batch-size 256 --images 8192 --shard-size 512 --threads 14 --rounds 2)
    latency=() sam=() jpeg=(--threads 14) card=() nvjpeg=(--decoder nvjpeg --images 4096)
else
    export TORCH_COMPILE_DISABLE=1  # for a CPU it takes minutes
    train+=(--student regla_t --image-size 64 --batch-size 4 --images 16 --head-dim 32 --steps 1 --rounds 1)
    extraction+=(--teacher hog --weights pretrained --images 8 --batch-size 4 --rounds 1)
    latency=(--models regla_t mobilenetv3_small_050 unknown --sizes 64 --batches 1 --forms fused --rounds 1)
    sam=(--side 256 --width 96 --heads 2 --batches 1 --calls 1) jpeg=(--images 16 --rounds 1) card=(--side 64) nvjpeg=()
fi

step card 25 benchmarks/card.py --device "$device" "${card[@]}"
step tests 70 -m pytest -p no:cacheprovider tests/test_gpu.py
step extraction 60 "${extraction[@]}"
step train 60 "${train[@]}"
step train-compiled 95 "${train[@]}" --compile
step train-compiled-graphs 70 "${train[@]}" --compile --cuda-graphs
step latency 130 benchmarks/latency.py --device "$device" "${latency[@]}"
step sam 50 benchmarks/sam_attention.py --device "$device" "${sam[@]}"
step jpeg 20 benchmarks/jpeg_decode.py --device "$device" "${jpeg[@]}"
step extraction-nvjpeg 45 "${extraction[@]}" "${nvjpeg[@]}"

summary=$(IFS=,; echo "{\"step\": \"summary\", \"device\": \"$device\", \"seconds\": $SECONDS, \"status\": {${statuses[*]}}}")
echo "$summary" | tee -a "$results"
