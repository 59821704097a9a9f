#!/bin/sh
# make-venv.sh FOLDER [PYTHON]: a virtual environment with this package (editable), napari, Qt and the test tools.
set -eu

venv=$1
asked=${2:-}

usable() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

if ! usable "$venv/bin/python"; then
    python=""
    for candidate in ${asked:-python3.11 python3.12 python3.13 python3 python}; do
        if usable "$candidate"; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "make: expected Python 3.11 or newer with its venv module, found none (tried: ${asked:-python3.11, python3.12, python3.13, python3, python})." >&2
        echo "      Debian 12: sudo apt-get install python3 python3-venv; Ubuntu: python3.12 and python3.12-venv; or make PYTHON=/path/to/python" >&2
        exit 1
    fi
    echo "virtual environment $venv from $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

install() {
    "$venv/bin/python" -m pip install --quiet --retries 10 --timeout 60 "$@"
}
install --upgrade pip
echo "installing napari-xanes-tomo, napari, Qt and the test tools (a minute or more)"
install --editable ".[all,test]"
