"""Writes the licences of everything that is linked into the program: of each crate, and of the C and C++ sources within.

Usage: licences.py > THIRD-PARTY.txt, in the repository. A crate without any licence text is named with its licence's name; one
without that either is an error.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

# Sources of other projects lie this deep within crates at most (librocksdb-sys/rocksdb, libmimalloc-sys/c_src/mimalloc).
DEPTH = 3
NAMES = re.compile(r"^(LICEN[CS]E|COPYING|NOTICE|COPYRIGHT|UNLICENSE)([-_.].*)?$", re.IGNORECASE)
RUNTIME = """libstdc++ and libgcc (GCC): GPL-3.0-or-later with the GCC Runtime Library Exception 3.1, which permits programs that are
compiled with GCC to contain these libraries under terms of their own choice. The Rust standard library: MIT OR Apache-2.0
(https://github.com/rust-lang/rust)."""


def cargo(*words):
    return subprocess.run(["cargo", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def linked():
    """Names and versions of the crates that the program is made of."""
    tree = cargo("tree", "--locked", "-p", "quire", "-e", "normal", "--target", "x86_64-unknown-linux-gnu", "--prefix", "none",
                 "--format", "{p}")
    return {tuple(line.split()[:2]) for line in tree.splitlines() if line}


def texts(folder):
    """The licence files of a crate, by their paths within it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        within = path.relative_to(folder)
        if len(within.parts) <= DEPTH and NAMES.match(path.name) and path.is_file() and path.suffix not in (".rs", ".py"):
            found[str(within)] = path.read_text(errors="replace").strip()
    return found


def main():
    platform = ("--filter-platform", "x86_64-unknown-linux-gnu")
    packages = json.loads(cargo("metadata", "--locked", "--format-version", "1", *platform))["packages"]
    wanted = linked()
    used, nameless = {}, []
    print("Quire is under Apache-2.0 (LICENSE), the reference model's weights under CC BY-SA 4.0 (its NOTICE.md). The program")
    print("contains the following.\n")
    print(RUNTIME + "\n")
    for package in sorted(packages, key=lambda p: (p["name"], p["version"])):
        if (package["name"], "v" + package["version"]) not in wanted or package["source"] is None:
            continue
        found = texts(Path(package["manifest_path"]).parent)
        if not package["license"] and not found:
            nameless.append(package["name"])
        numbers = [used.setdefault(text, len(used) + 1) for text in found.values()]
        where = ", ".join(f"{name} [{number}]" for name, number in zip(found, numbers)) or "no text in the package"
        print(f"{package['name']} {package['version']}: {package['license'] or 'see the text'}; {where}")
        print(f"    {package['repository'] or package['homepage'] or ''}")
    for text, number in used.items():
        print(f"\n{'=' * 120}\n[{number}]\n\n{text}")
    if nameless:
        sys.exit(f"crates without a licence: {', '.join(nameless)}")


main()
