#!/usr/bin/env bash
# accelerate 1.15.0 on a machine without a GPU, with two processes, in the three ways that one would try:
#   accelerate launch --cpu --num_processes 2    starts one process; it counts processes only with MPI and a host file
#   torchrun --nproc-per-node 2                  starts two, and in each Accelerator().num_processes is 1
#   the same with Accelerator(cpu=True)          starts two, which count 2
# Nothing is said in the first two. One expects two processes that know of each other in all three: the launcher was told
# the number, or has told it to its processes, and there is no other device that they could run on.
# It matters because two processes that count themselves alone train two models, from the same data, and write to the
# same files; transformers' Trainer does so too, unless use_cpu=True.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0
cd "$folder"
export OMP_NUM_THREADS=1 HF_HOME="$folder/home"

cat > script.py <<'PYTHON'
import os
import sys

import accelerate

name, *cpu = sys.argv[1:]
state = accelerate.Accelerator(cpu=bool(cpu))
with open(f"{name}-{os.environ.get('RANK', 'alone')}", "w") as file:
    file.write(str(state.num_processes))
PYTHON

asked=(--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no)
venv/bin/python -c 'import torch, accelerate; print("torch", torch.__version__, "accelerate", accelerate.__version__)'
venv/bin/accelerate launch --cpu "${asked[@]}" script.py launch cpu 2> log.launch
venv/bin/torchrun --nproc-per-node 2 script.py plain 2> log.plain
venv/bin/torchrun --nproc-per-node 2 script.py told cpu
for name in launch plain told; do
    echo "$name: $(ls -d $name-* | wc -l) process(es), which count $(cat $name-*)"
done

test "$(ls -d launch-*) $(cat launch-*)" = "launch-alone 1" || { echo "Not as described: --cpu starts several."; exit 1; }
test "$(cat plain-0) $(cat plain-1)" = "1 1" || { echo "Not as described: they know of each other."; exit 1; }
test "$(cat told-0) $(cat told-1)" = "2 2" || { echo "Not as described: with cpu=True they count otherwise."; exit 1; }
if grep -qi 'num_processes\|gpu\|alone' log.launch log.plain; then
    echo "Not as described: something is said:"
    cat log.launch log.plain
    exit 1
fi
