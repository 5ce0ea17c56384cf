#!/bin/sh
# Makes .venv and installs Lamina into it, with the extras that are named: scripts/environment.sh dev,bench
set -eu

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then # none yet, or one whose Python has gone
    found=
    for python in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            found=$python
            break
        fi
    done
    if [ -z "$found" ]; then
        echo "found no Python that can make an environment, expected Python 3.11 or later with venv" \
            "(on Debian and Ubuntu: apt install python3-venv); name another with: make PYTHON=/path/to/python" >&2
        exit 2
    fi
    echo "setting up .venv with $("$found" --version): once, some minutes, most of them for PyTorch"
    "$found" -m venv --clear .venv
fi

quiet=--quiet
[ -t 1 ] && quiet= # a person wants to see the downloads move
.venv/bin/python -m pip install --disable-pip-version-check $quiet --editable ".${1:+[$1]}"
