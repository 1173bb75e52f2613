#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU, with or without network: builds and installs pared with its CUDA part, runs the GPU tests,
# measures against the goals, writes bench/results/gpu-<device>-<date>.json and prints the table. Under 8 minutes of measuring.
#
#   bench/gpu.sh                    everything
#   bench/gpu.sh --no-install       with the pared that is importable
#   bench/gpu.sh --no-sanitizer     without compute-sanitizer
#   bench/gpu.sh --only select      the suites of bench/gpu/ whose name contains this
#   bench/gpu.sh --dry-run          on any machine: the same flow on tiny problems, CPU tensors and a clock that does not measure;
#                                   no build, no file
#
# CUTLASS_DIR=... (the folder above include/ of nvidia-cutlass 4.2.0.0) where that package is not installed: without its headers
# int8 products use mma.sync on sm_90 too.
#
# Needs Python with torch (CUDA), numpy, pytest, hypothesis, scikit-build-core, pybind11, CMake and ninja; PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
install=1 sanitizer=1 dry= only=()
while [ $# -gt 0 ]; do
  case $1 in
    --no-install) install= ;;
    --no-sanitizer) sanitizer= ;;
    --dry-run) dry=1 install= sanitizer= ;;
    --only) only=(--only "${2:?--only: expected a name}"); shift ;;
    *) echo "gpu.sh: unknown option $1; see the head of the file" >&2; exit 2 ;;
  esac
  shift
done
step() { printf '\n==== %s (at %d s)\n' "$*" "$SECONDS"; "$@"; }

if [ -n "$dry" ]; then
  step "$python" -m bench.gpu --dry-run "${only[@]}"
  exit
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total --format=csv
if [ -n "$install" ]; then
  # The device's own architecture: half the time. What is installed elsewhere holds them all.
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  [ "$capability" = 90 ] && capability=90a
  PARED_CUDA=on CUDAARCHS="$capability-real" \
    step "$python" -m pip install --no-build-isolation --no-deps --force-reinstall .
fi
# Kernels have to be right before they are fast. Measuring goes on after a failure, which the exit code keeps.
failed=0
step "$python" -m pytest tests/cuda tests/test_cuda.py -q -k "not emulated" -p no:cacheprovider || failed=1
if [ -n "$sanitizer" ] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=pared \
      "$python" -m pytest tests/cuda -q -x -k "cuda and (misaligned or rows or sampled or self or mma or copies)" \
      -p no:cacheprovider || failed=1
  done
fi
step "$python" -m bench.gpu "${only[@]}" || failed=1
exit $failed
