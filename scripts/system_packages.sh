#!/usr/bin/env bash
# Qt and a virtual display for the tests that open a window: installed by apt-get when root, else the missing ones are named.
set -euo pipefail
packages=(
    xvfb libegl1 libgl1 libgl1-mesa-dri libglx-mesa0 libdbus-1-3 libfontconfig1 libxkbcommon-x11-0
    libxcb-cursor0 libxcb-icccm4 libxcb-image0 libxcb-keysyms1 libxcb-randr0 libxcb-render-util0 libxcb-shape0 libxcb-xkb1
)

if ! command -v dpkg-query >/dev/null; then
    if [ "$(uname)" = Linux ] && ! command -v Xvfb >/dev/null; then
        echo "the window tests need Xvfb, EGL and Qt's xcb libraries (on Debian: ${packages[*]})" >&2
        exit 1
    fi
    exit 0
fi

missing=()
for package in "${packages[@]}"; do
    case "$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null)" in
        *" installed") ;;
        *) missing+=("$package") ;;
    esac
done
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi
if [ "$(id -u)" -ne 0 ]; then
    echo "the window tests need system packages; as root: apt-get install ${missing[*]}" >&2
    exit 1
fi
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
