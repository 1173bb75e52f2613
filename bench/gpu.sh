#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU, with or without network: builds pared with its CUDA part, runs
# every kernel once, measures against the goals, tests. It ends by itself before --seconds have passed; a part
# that fails, hangs or finds no time left costs nothing but itself, and what was measured is in the file of results
# after every case.
#
#   bench/gpu.sh                       everything, the most valuable first, in 570 s
#   bench/gpu.sh --seconds 1200        with more time
#   bench/gpu.sh --only int8,decode    the build and these parts
#   bench/gpu.sh --no-build            with the extensions that build/gpu/package holds (from a run on a like machine)
#   bench/gpu.sh --results FILE        bench/results/gpu-<device>-<date>.json otherwise; a file that exists is added to
#   bench/gpu.sh --dry-run             on any machine: the same flow on tiny problems, in the emulator, with a clock that
#                                      does not measure; no build, no file
#
# Parts: smoke (every kernel once: PASS or FAIL), the suites of bench/gpu/, tests (tests/cuda on the device), memcheck and
# racecheck (compute-sanitizer on every kernel once).
#
# The first run of a kernel on a machine: `--only smoke` takes a minute behind the build. With commands of ten minutes:
#   1. bench/gpu.sh
#   2. bench/gpu.sh --only tests,<what the first one named as not measured>
#   3. bench/gpu.sh --only memcheck,racecheck,...
# Where the machine does not outlast a command, keep FILE, the output and build/gpu/package/pared/*.so of the first one: the
# next ones begin with --no-build.
# The build is some twenty minutes of one core, of which single files take one to three. build/gpu is kept, so that a
# second call builds what changed, or goes on where the first one's time was over.
#
# CUTLASS_DIR=... (the folder above include/ of nvidia-cutlass 4.2.0.0) where that package is not installed: without its
# headers int8 products use mma.sync on sm_90 too. It is looked for in .cutlass/ of the repository as well.
#
# Needs Python with torch (CUDA), numpy, pytest, hypothesis, pybind11, safetensors, rich, typer, CMake and, better, ninja;
# PYTHON=... chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
seconds=570 build=1 dry= only= results=
# Name and the most seconds of each part. The sum is more than there is: what is slow must not cost the rest its turn.
parts=(smoke:90 select:60 int8:75 decode:90 stack:60 block_sparse:75 mlp:60 csr:75 two_four:45 conv:60 tests:400
  memcheck:150 racecheck:150)
names() { printf '%s\n' "${parts[@]%%:*}"; }
while [ $# -gt 0 ]; do
  case $1 in
    --no-build) build= ;;
    --dry-run) dry=1 ;;
    --only | --seconds | --results)
      [ $# -gt 1 ] || { echo "gpu.sh: $1: expected a value behind it" >&2; exit 2; }
      declare "${1#--}=$2"
      shift ;;
    *) echo "gpu.sh: unknown option $1; see the head of the file" >&2; exit 2 ;;
  esac
  shift
done
for name in ${only//,/ }; do
  names | grep -qx "$name" || { echo "gpu.sh: --only: expected names among $(names | xargs), got $name" >&2; exit 2; }
done
[[ $seconds =~ ^[0-9]+$ ]] || { echo "gpu.sh: --seconds: expected a number, got $seconds" >&2; exit 2; }
export PYTHONUNBUFFERED=1

if [ -n "$dry" ]; then
  status=0
  suites=$(comm -12 <(names | sort) <(echo "${only:-$(names)}" | tr ', ' '\n' | sort) | grep -vE '^(smoke|tests|.*check)$' | paste -sd,)
  case ",${only:-smoke}," in *,smoke,*) "$python" -m bench.gpu.smoke --dry-run || status=1 ;; esac
  [ -z "$suites" ] || "$python" -m bench.gpu --dry-run --only "$suites" || status=1
  exit $status
fi

report=()
failed=0
# part NAME SECONDS COMMAND...: runs it for at most so long and at most what is left, and notes how it ended.
part() {
  local name=$1 most=$2 left=$((seconds - SECONDS - 5)) status=0 begin=$SECONDS
  shift 2
  if [ $left -lt 15 ]; then
    report+=("$name: not run, the $seconds s were spent")
    return
  fi
  [ "$left" -lt "$most" ] && most=$left
  printf '\n==== %s (at %d s, at most %d s)\n' "$name" "$SECONDS" "$most"
  limit=$most timeout -k 10 "$most" "$@" || status=$?
  case $status in
    0) report+=("$name: done in $((SECONDS - begin)) s") ;;
    124 | 137) report+=("$name: STOPPED after $most s") failed=1 ;;
    *) report+=("$name: FAILED (exit code $status) after $((SECONDS - begin)) s") failed=1 ;;
  esac
  return $status
}
finish() {
  printf '\n==== the parts\n'
  printf '%s\n' "${report[@]}"
  [ -f "${results:-}" ] && printf 'results: %s\n' "$results"
  exit $failed
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total --format=csv ||
  { echo "gpu.sh: no NVIDIA GPU here; --dry-run goes the same way without" >&2; exit 2; }
"$python" - <<'PY' || exit 2
import importlib.util, os, sys, sysconfig
import torch
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.is_available())
headers = sysconfig.get_paths()["include"]
if not os.path.exists(os.path.join(headers, "Python.h")):
    print(f"gpu.sh: no Python.h in {headers}: the build fails unless CMake finds it elsewhere")
needed = ("numpy", "pytest", "hypothesis", "pybind11", "safetensors", "rich", "typer", "scipy")
missing = [n for n in needed if importlib.util.find_spec(n) is None]
if missing or not torch.cuda.is_available():
    sys.exit(f"gpu.sh: expected a torch that sees the GPU, and {', '.join(needed)}; missing: {missing}")
PY

package=$PWD/build/gpu/package
build_package() {  # CUTLASS: ON or OFF
  # The device's own architecture alone. What is installed elsewhere holds them all.
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  [ "$capability" = 90 ] && capability=90a
  command -v nvcc >/dev/null || export PATH=$PATH:/usr/local/cuda/bin
  [ -n "${CUTLASS_DIR:-}" ] || [ ! -d .cutlass/include ] || export CUTLASS_DIR=$PWD/.cutlass
  local generator=()
  command -v ninja >/dev/null && generator=(-G Ninja)
  cmake -S . -B build/gpu "${generator[@]}" -DPython_EXECUTABLE="$(command -v "$python")" -DPARED_CUDA=on \
    -DCMAKE_CUDA_ARCHITECTURES="$capability-real" -DCMAKE_BUILD_TYPE=Release -DPARED_CUTLASS="$1" &&
    cmake --build build/gpu --parallel "$(nproc)" && cmake --install build/gpu --prefix "$package"
}
export -f build_package
export python package
if [ -n "$build" ]; then
  # Nothing can be measured before it is done; what it is stopped for, a build of less would be too.
  part build $((seconds * 5 / 6)) bash -c "build_package ON"
  case $? in
    0) ;;
    124 | 137)
      report+=("what is built stays in build/gpu: call again on this machine")
      finish ;;
    # What a compiler most likely refuses is CUTLASS: the rest is not lost with it.
    *) part "build without CUTLASS" 330 bash -c "build_package OFF" || finish ;;
  esac
fi
# The Python files of this tree beside the extensions, without those that another build has left among them.
mkdir -p "$package/pared"
find "$package/pared" -name '*.py' -delete
tar -C python --exclude='*.so' --exclude=__pycache__ -cf - pared | tar -C "$package" -xf -
export PYTHONPATH=$package:$PWD
"$python" -c 'import pared._core, pared._cuda_kernels as k; print(pared.__file__, k.ARCHITECTURES)' ||
  { report+=("import: FAILED"); failed=1; finish; }
[ -n "$results" ] || results=$("$python" -c 'from bench.gpu.__main__ import default_path; print(default_path())')

sanitize() {  # TOOL: every kernel once, then views at odd addresses
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; return 3; }
  # Each tensor an allocation of its own: behind one of torch's large blocks an access out of bounds is in bounds.
  export PARED_TEST_GPU=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local under=(compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-regex kns=pared "$python" -m)
  "${under[@]}" bench.gpu.smoke --work &&
    "${under[@]}" pytest tests/cuda -q -x -W default -k "misaligned or views" -p no:cacheprovider
}
export -f sanitize
for entry in "${parts[@]}"; do
  name=${entry%%:*} most=${entry##*:}
  [ -z "$only" ] || [[ ",$only," == *",$name,"* ]] || continue
  case $name in
    smoke) part smoke "$most" "$python" -m bench.gpu.smoke ;;
    tests) PARED_TEST_GPU=1 part tests "$most" "$python" -m pytest tests/cuda tests/test_cuda.py \
      -q -W default -p no:cacheprovider ;;
    memcheck | racecheck) part "$name" "$most" bash -c "sanitize $name" ;;
    # No case begins in the last seconds, so that the table is printed.
    *) part "$name" "$most" bash -c '"$0" -m bench.gpu --only "$1" --results "$2" --seconds $((limit - 15))' \
      "$python" "$name" "$results" ;;
  esac
done
finish
