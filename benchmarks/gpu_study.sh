#!/usr/bin/env bash
# Runs a study's cells many at a time on a GPU machine without network:  benchmarks/gpu_study.sh OUT_DIR
#
# make study-packages, where there is network, downloads what mfwm needs beside torch into build/study (for the Python of
# the GPU machine: STUDY_PYTHON=3.12). Cells are kept in CELLS, by default OUT_DIR/cells; a later call with the same
# CELLS resumes. DEADLINE is the limit in seconds, WORKERS the number of cells at a time, PLAN the plan.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?"usage: benchmarks/gpu_study.sh OUT_DIR"}
python=${PYTHON:-python3}
cells=${CELLS:-$out/cells}
started=$SECONDS
mkdir -p "$out" build/study
"$python" -m pip install --quiet --no-index --no-deps --find-links build/study --target build/study/installed --upgrade \
  -r benchmarks/study/packages.txt
export PYTHONPATH="$PWD:$PWD/python:$PWD/build/study/installed"
left=$((${DEADLINE:-540} - (SECONDS - started)))
# SIGTERM lets every cell save a checkpoint, and the study write the results of those that are done.
status=0
timeout --signal=TERM --kill-after=60 "$left" "$python" -u -m mfwm.cli study "${PLAN:-benchmarks/study/gpu.toml}" \
  --out "$cells" --workers "${WORKERS:-12}" 2>&1 | tee "$out/study.log" || status=$?
for file in results.json index.html; do
  if [ -f "$cells/$file" ] && [ ! "$cells/$file" -ef "$out/$file" ]; then cp "$cells/$file" "$out/$file"; fi
done
exit "$status"
