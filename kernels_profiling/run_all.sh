#!/usr/bin/env bash
# Everything we would measure on one GPU, what nobody has published first, in parts that end within nine minutes each.
# A part that was cut short goes on where it stopped when it is called again; no part needs a network.
#
#   kernels_profiling/run_all.sh [--device cuda|cpu] [--out FOLDER] [--part N]...      all parts, or those named
#
# --device cpu rehearses every part with a tiny model and small sizes. Parts 1 to 7 and 12 in one command, by turns and with
# bounds, are `python -m kernels_profiling prove`, which takes longer than a part may.
#
#   1 mixed prefill and decode attention over (chunk, history, decodes)      7 live engine, first model, three loads
#   2 burst against sustained products and attention, power, two contents    8 live engine, first model, overload
#   3 products                                                               9 live engine, second model
#   4 prefill and decode attention                                          10 SwiftKV: prefills with and without
#   5 the other operators, and collectives where there are ranks            11 transformers' continuous batching
#   6 the fit: a device profile from all tables                             12 measured runs beside simulated ones
set -euo pipefail

device=cuda out=measured parts=()
while (($#)); do
  case $1 in
    --device) device=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --part) parts+=("$2"); shift 2 ;;
    *) echo "run_all.sh: got $1; give --device cuda|cpu, --out FOLDER, --part 1..12" >&2; exit 2 ;;
  esac
done
((${#parts[@]})) || parts=({1..12})

here=$(cd "$(dirname "$0")" && pwd)
tables=$out/tables runs=$out/runs profile=$out/device-profile.yaml
most_s=540 budget_s=420
if [[ $device == cuda ]]; then
  models=(llama-3.1-8b qwen3-32b) rates=(2 6 12) overload=60 seconds=60 quick=() workload=chat
  first=(--model llama-3.1-8b --tensor 1) held=() prompts=(512 1024 2048 4096 8192)
  ranks=$(python -c 'import torch; print(torch.cuda.device_count())')
else
  models=("$here/models/tiny.yaml" "$here/models/tiny.yaml") rates=(0.5 1 2) overload=8 seconds=6 quick=(--quick)
  workload=$here/workloads/short.yaml
  first=() held=(--held-s 0.2) prompts=(64 128)
  budget_s=60 ranks=2
fi

profiling() { timeout "$most_s" python -m kernels_profiling "$@"; }
measure() { profiling measure --device "$device" --out "$tables" --budget-s "$budget_s" "$@"; }
once() { # name command...: what is marked as done is not done again
  local mark=$out/done-$1
  shift
  [[ -e $mark ]] || { "$@" && touch "$mark"; }
}
live() { # model rate requests
  profiling live --device "$device" --model "$1" --workload "$workload" --rate-per-s "$2" --requests "$3" --profile "$profile" --out "$runs"
}
second_engine() {
  if ! python -c 'import transformers' 2>/dev/null; then
    echo "part 11 is left out: it needs pip install 'apexsim[second-engine]'" >&2
    return
  fi
  once 11 profiling second-engine --device "$device" --model "${models[0]}" --workload "$workload" --rate-per-s "${rates[0]}" \
    --requests "$(requests "${rates[0]}")" --profile "$profile" --out "$runs"
}
requests() { python -c "print(max(6, int($1 * $seconds)))"; }

part() {
  case $1 in
    1) measure --only mixed_attention "${quick[@]}" "${first[@]}" ;;
    2) measure --only sustained "${quick[@]}" "${first[@]}" "${held[@]}" ;;
    3) measure --only gemm "${quick[@]}" ;;
    4) measure --only prefill_attention,decode_attention "${quick[@]}" ;;
    5) measure --only elementwise,sampling,moe,memory_copy,launch,collective --ranks "$ranks" "${quick[@]}" ;;
    6) apexsim fit "$tables" --device "measured-$device" --out "$profile" ;;
    7) for rate in "${rates[@]}"; do once "7-$rate" live "${models[0]}" "$rate" "$(requests "$rate")"; done ;;
    8) once 8 live "${models[0]}" "$overload" "$(requests "$overload")" ;;
    9) for rate in "${rates[@]:0:2}"; do once "9-$rate" live "${models[1]}" "$rate" "$(requests "$rate")"; done ;;
    10) once 10 profiling swiftkv --device "$device" --model "${models[0]}" "${prompts[@]/#/--prompt-tokens=}" --out "$out/swiftkv.csv" ;;
    11) second_engine ;;
    12) apexsim validate "$runs/runs.csv" ;;
    *) echo "run_all.sh: --part: got $1; parts are 1 to 12" >&2; exit 2 ;;
  esac
}

mkdir -p "$out"
for number in "${parts[@]}"; do
  echo "part $number" >&2
  part "$number"
done
