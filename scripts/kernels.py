#!/usr/bin/env python3
"""Compiles every CUDA kernel for every supported architecture, without a GPU, and reports what it costs.

usage: kernels.py [FILE.cu ...]

Fails on a compile error, and on a kernel whose registers spill. A file may say in its top comment "// Only: sm_90a" (the
architectures it is for), and "// Spills: NAME for sm_100a" (an entry whose spills are known and allowed there). Needs the wheel nvidia-cuda-nvrtc
alone.
"""

import ctypes
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import files
from pathlib import Path

ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a"]
KERNELS = Path(__file__).resolve().parent.parent / "engine" / "kernels"
OPTIONS = ["--std=c++17", "--ptxas-options=-v"]


def nvrtc():
    """The library of the installed wheel."""
    # The builtins first: the wheel's folder is not on the loader's path.
    for pattern in [r"libnvrtc-builtins\.so\.[\d.]+", r"libnvrtc\.so\.\d+"]:
        found = [p for p in files("nvidia-cuda-nvrtc") if re.fullmatch(pattern, p.name)]
        if not found:
            sys.exit("kernels.py: no NVRTC in the wheel nvidia-cuda-nvrtc; install scripts/requirements-test.txt")
        library = ctypes.CDLL(str(found[0].locate()))
    return library


def compile_kernel(job):
    """Compiles one file for one architecture: (file, architecture, succeeded, log)."""
    path, architecture = job
    library = nvrtc()
    headers = sorted(KERNELS.glob("*.cuh"))
    sources = (ctypes.c_char_p * len(headers))(*[h.read_bytes() for h in headers])
    names = (ctypes.c_char_p * len(headers))(*[h.name.encode() for h in headers])
    program = ctypes.c_void_p()
    status = library.nvrtcCreateProgram(
        ctypes.byref(program), path.read_bytes(), path.name.encode(), len(headers), sources, names
    )
    if status != 0:
        return path.name, architecture, False, f"nvrtcCreateProgram failed with status {status}"
    options = [o.encode() for o in [*OPTIONS, f"--gpu-architecture={architecture}"]]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return path.name, architecture, status == 0, log.value.decode(errors="replace")


def entries(log):
    """(kernel, registers, shared bytes, stack bytes, spilled bytes) of each entry point that ptxas reports."""
    for part in log.split("Compiling entry function '")[1:]:
        number = lambda pattern: sum(int(n) for n in re.findall(pattern, part))
        yield (
            part.split("'")[0],
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes smem"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill (?:stores|loads)"),
        )


def architectures(path, word, default):
    """What a file's top comment lists behind `word`."""
    found = re.search(rf"^// {word}: (.*)$", path.read_text(), re.MULTILINE)
    return found.group(1).split(", ") if found else default


def main():
    started = time.monotonic()
    paths = [Path(a) for a in sys.argv[1:]] or sorted(KERNELS.glob("*.cu"))
    jobs = [(path, architecture) for path in paths for architecture in architectures(path, "Only", ARCHITECTURES)]
    failures = []
    with ProcessPoolExecutor(2) as pool:
        for name, architecture, succeeded, log in pool.map(compile_kernel, jobs):
            found = list(entries(log))
            if not succeeded or not found:
                failures.append(f"{name} for {architecture} does not compile:\n{log}")
            for kernel, registers, shared, stack, spilled in found:
                print(f"{name:24}{architecture:9}{kernel:36}{registers:4} registers {shared:6} shared {stack:5} stack")
                if spilled > 0 and f"{kernel} for {architecture}" not in architectures(KERNELS / name, "Spills", []):
                    failures.append(f"{name} for {architecture}: {kernel} spills {spilled} bytes")
    print(f"{len(jobs)} compilations in {time.monotonic() - started:.0f} s")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
