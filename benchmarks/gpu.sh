#!/bin/sh
# What is measured on a GPU, in the order of its weight:
#
#     sh benchmarks/gpu.sh FOLDER [PART ...]
#
# Parts: tests, speed, pearl, runs (all of benchmarks/gpu.txt; one that was stopped goes on from its
# checkpoint). Each leaves files in FOLDER. PYTHON is the interpreter, python3 unless set.
set -u
out=$(realpath "$1")
shift
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
for part in ${*:-tests speed pearl runs}; do
    case $part in
    tests) "$python" -m pytest -q -p no:cacheprovider tests/test_graphs.py tests/test_cuda.py ;;
    speed) "$python" benchmarks/speed.py scripts --cuda --iterations 12 ;;
    pearl) "$python" benchmarks/speed.py pearl --cuda --rounds 2 ;;
    runs) "$python" benchmarks/run.py benchmarks/gpu.txt --jobs 1 ;;
    *) echo "no part $part" ;;
    esac >"$out/$part.txt" 2>&1
    nvidia-smi --query-gpu=name --format=csv,noheader >>"$out/$part.txt" 2>&1
    cp -r benchmarks/results/gpu "$out/" 2>/dev/null
done
