#!/bin/sh
# All seven variants, or those that are named, side by side on one GPU, with larger pictures than
# the yardstick's: no yardstick but a run to stand beside it. From the repository's root:
#
#     benchmarks/bccd_gpu.sh DATA RESULTS [MINUTES [VARIANT...]]
#
# DATA as for bccd.py; RESULTS gets bccd_VARIANT_gpu.json and .log of each. MINUTES of training are
# 9 by default, to which evaluations and the start add about one. Each training takes a core, and
# another for its pictures. `nvidia-cuda-mps-control -d`, called before, lets their kernels overlap.
set -eu
data=$1 results=$2 minutes=${3:-9}
shift "$(($# < 3 ? $# : 3))"
[ $# -gt 0 ] || set -- detr deformable_detr conditional_detr efficient_detr anchor_detr \
  dynamic_detr sparse_rcnn
mkdir -p "$results"
export HF_QUERYDET_KERNELS=require OMP_NUM_THREADS=1
# Once, before all ask for them.
python -c 'from hf_querydet.ops import extension; extension.load("cuda")'

running=""
for variant; do
  python benchmarks/bccd.py "$variant" --data "$data" --minutes "$minutes" \
    --device cuda --workers 1 --note "$# trainings share the GPU" \
    --recipe-fields '{"shortest_edge": 288, "longest_edge": 384}' \
    --output "$results/bccd_${variant}_gpu.json" >"$results/bccd_${variant}_gpu.log" 2>&1 &
  running="$running $!"
done
failed=0
for job in $running; do
  wait "$job" || failed=1
done
python benchmarks/bccd_table.py --gpu --results "$results"
exit $failed
