#!/usr/bin/env bash
# Passes the tests, style checks included. Needs python3 >= 3.11 with pip, nothing else.
#
#   bash launch/test.sh                    everything
#   bash launch/test.sh -m "not slow"      the quick part; all arguments go to pytest
#
# PYTHON chooses the interpreter for a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh test

ruff check .
ruff format --check .
python -m pytest "$@"
