#!/bin/sh
# The system libraries Qt, OpenGL and the tests need on Debian and Ubuntu: installed when root, named otherwise.
# Never fails: the science and the command line work without them.
set -eu

wanted="libdbus-1-3 libegl1 libfontconfig1 libgl1 libgl1-mesa-dri libglib2.0-0
libxcb-cursor0 libxcb-icccm4 libxcb-image0 libxcb-keysyms1 libxcb-randr0 libxcb-render-util0 libxcb-shape0
libxcb-shm0 libxcb-sync1 libxcb-util1 libxcb-xfixes0 libxcb-xinerama0 libxcb-xkb1 libxkbcommon-x11-0
xauth xvfb"

if ! command -v dpkg-query >/dev/null 2>&1; then
    echo "system libraries: not Debian or Ubuntu; the viewer needs Qt's xcb libraries and OpenGL, the tests need Xvfb"
    exit 0
fi

missing=""
for package in $wanted; do
    # The second name is the one of Ubuntu 24.04 and Debian 13 (64-bit time_t).
    for name in "$package" "${package}t64"; do
        if dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q "ok installed"; then
            continue 2
        fi
    done
    missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -eq 0 ]; then
    echo "system libraries: installing$missing"
    export DEBIAN_FRONTEND=noninteractive
    if apt-get update -q && apt-get install -q -y --no-install-recommends $missing </dev/null; then
        exit 0
    fi
    echo "system libraries: apt-get failed; going on without. To try again by hand:"
else
    echo "system libraries: the viewer and its tests need packages that are not installed. To install them:"
fi
echo "    sudo apt-get install -y --no-install-recommends$missing"
