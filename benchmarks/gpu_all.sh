#!/usr/bin/env bash
# Checks and measures the kernels on a GPU machine without network:  benchmarks/gpu_all.sh check|bench OUT_DIR
# The stages are in benchmarks/gpu_all.py; docs/gpu.md describes their output.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_all.py" "$@"
