#!/usr/bin/env bash
# Whether what `proof.py` measures on a CPU holds on larger images and over thousands of steps, in at most ten minutes of a GPU:
#
#     benchmarks/imagenette_on_a_gpu.sh <folder with train and val> <mobilenetv2>.safetensors <efficientnet_lite2>.safetensors [arm]...
#
# ReGLA-T at 160 px (SIZE) for some 3,000 steps of 64 images (STEPS), one seed. Arms are trained one after the other, the most wanted
# first; those for which the time does not suffice are missing in the table and in the JSON of the last line. WORK is the folder of
# the cache and the students.
# PYTHON is the interpreter, with the packages of pyproject.toml but Ray and MLflow.
set -uo pipefail
images=$(realpath "$1") mobilenet=$(realpath "$2") efficientnet=$(realpath "$3") || exit 1
shift 3
arms=("$@")
((${#arms[@]})) || arms=(all crops-8 crops-8-mixup patch-relation-0.5)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3} size=${SIZE:-160} steps=${STEPS:-3000} budget=580
count=$(find "$images/train" -type f | wc -l)
epochs=$(((steps * 64 / count + 4) / 8 * 8)) # arms with crops divide them by 8
work=${WORK:-work/imagenette-on-a-gpu}
proof=(benchmarks/proof.py benchmarks/three_teachers.yaml "data.train=$images/train" "data.val=$images/val" data.name=imagenette
    "teachers.1.weights=$mobilenet" "teachers.2.weights=$efficientnet" "teachers.0.input_size=$size" "teachers.1.input_size=$((2 * size))"
    "teachers.2.input_size=$((2 * size))" "student.input_size=$size" train.batch_size=64 "train.epochs=$((epochs > 8 ? epochs : 8))"
    "work=$work" --results "$work.jsonl" --seeds 0)
trained=()
for arm in "${arms[@]}"; do
    left=$((budget - SECONDS))
    ((left > 20)) || break
    timeout -k 5 "$left" "$python" "${proof[@]}" --arms "$arm" --base "$arm" && trained+=("$arm")
done
((${#trained[@]})) || exit 1
"$python" "${proof[@]}" --arms "${trained[@]}" --base "${trained[0]}"
