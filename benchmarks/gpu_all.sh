#!/usr/bin/env bash
# Checks and measures a GPU machine without network, in two commands:  benchmarks/gpu_all.sh check|bench OUT_DIR
# The stages are in benchmarks/gpu_all.py; docs/gpu.md says what comes out.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_all.py" "$@"
