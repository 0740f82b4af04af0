"""Maximum-inner-product indexes from PyPI, on command, for side-by-side measurement.

Each line of standard input is a command in JSON, each line of standard output its answer in JSON. Rows are exchanged as
files of raw little-endian f32, found ids as files of raw little-endian i32 (-1: none found).

    {"cmd": "data", "keys": PATH, "dim": 128, "threads": 2}    the keys of all that follows; drops what was built
    {"cmd": "build", "peer": "hnswlib"}                         -> seconds, bytes, settings, knob
    {"cmd": "search", "peer": "hnswlib", "knob": 256, "queries": PATH, "k": 100, "ids": PATH, "batched": true}
                                                                -> latency_us, batched_us, touched
    {"cmd": "quit"}

Building uses `threads` threads, searching one. `latency_us` is the median over queries of a call with one query, the
cost of the call from Python included; `batched_us` is the time of one call with all queries, over their number, null
unless asked for;
`touched` is the mean number of keys that were compared with a query, null where the library does not tell. `bytes` is
what the resident memory grew by, the keys that the library copies included.

Usage: index_peers.py
"""

import json
import os
import sys
import time


def reply(**fields):
    print(json.dumps(fields), file=ANSWERS, flush=True)


# Whatever libraries print must not end up between the answers.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

try:
    import faiss
    import hnswlib
    import numpy as np
    import usearch
    import usearch.index
except ImportError as error:
    reply(error=f"cannot import faiss, hnswlib, usearch and numpy: {error}")
    sys.exit(1)

# Links of a key and candidates while building: above the libraries' defaults (16 and 200, 32 and 40, 16 and 128), since
# more of both only raises the recall that these graphs reach on hard data.
LINKS, CANDIDATES = 32, 200


# A peer's `compared` is how many keys it has compared with queries since it was built; only differences count.


class Hnswlib:
    knob = "ef"

    def __init__(self, keys, threads):
        self.index = hnswlib.Index("ip", keys.shape[1])
        self.index.init_index(len(keys), M=LINKS, ef_construction=CANDIDATES)
        self.index.add_items(keys, num_threads=threads)
        self.settings = f"M={LINKS} ef_construction={CANDIDATES}"

    def set(self, knob):
        self.index.set_ef(knob)

    def search(self, queries, k):
        return self.index.knn_query(queries, k, num_threads=1)[0]

    def compared(self):
        return None


class FaissHnsw:
    knob = "efSearch"

    def __init__(self, keys, threads):
        self.index = faiss.IndexHNSWFlat(keys.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = CANDIDATES
        self.index.add(keys)
        self.settings = f"M={LINKS} efConstruction={CANDIDATES}"

    def set(self, knob):
        self.index.hnsw.efSearch = knob

    def search(self, queries, k):
        return self.index.search(queries, k)[1]

    def compared(self):
        return faiss.cvar.hnsw_stats.ndis


class FaissIvf:
    knob = "nprobe"

    def __init__(self, keys, threads):
        lists = max(1, min(1024, len(keys) // 64))
        self.quantizer = faiss.IndexFlatIP(keys.shape[1])
        self.index = faiss.IndexIVFFlat(self.quantizer, keys.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        self.index.cp.niter = 20
        self.index.train(keys)
        self.index.add(keys)
        self.settings = f"nlist={lists} niter=20"

    def set(self, knob):
        self.index.nprobe = min(knob, self.index.nlist)

    def search(self, queries, k):
        return self.index.search(queries, k)[1]

    def compared(self):
        return faiss.cvar.indexIVF_stats.ndis


class Usearch:
    knob = "expansion_search"

    def __init__(self, keys, threads):
        self.index = usearch.index.Index(
            ndim=keys.shape[1], metric="ip", dtype="f32", connectivity=LINKS, expansion_add=CANDIDATES
        )
        self.index.add(np.arange(len(keys)), keys, threads=threads)
        self.settings = f"connectivity={LINKS} expansion_add={CANDIDATES} f32 {self.index.hardware_acceleration}"
        self.distances = 0

    def set(self, knob):
        self.index.expansion_search = knob

    def search(self, queries, k):
        found = self.index.search(queries, k, threads=1)
        self.distances += found.computed_distances
        return np.atleast_2d(np.asarray(found.keys))

    def compared(self):
        return self.distances


PEERS = {"hnswlib": Hnswlib, "faiss-hnsw": FaissHnsw, "faiss-ivf": FaissIvf, "usearch": Usearch}


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rows(path, dim):
    return np.fromfile(path, dtype="<f4").reshape(-1, dim)


def build(state, command):
    name, threads = command["peer"], state["threads"]
    faiss.omp_set_num_threads(threads)
    before, start = resident(), time.perf_counter()
    peer = PEERS[name](state["keys"], threads)
    seconds = time.perf_counter() - start
    faiss.omp_set_num_threads(1)
    state["built"][name] = peer
    reply(seconds=seconds, bytes=max(0, resident() - before), settings=peer.settings, knob=peer.knob)


def whole(ids, count, k):
    """`[count, k]` ids, -1 where fewer were found."""
    out = np.full((count, k), -1, dtype="<i4")
    ids = np.asarray(ids).reshape(count, -1)[:, :k]
    out[:, : ids.shape[1]] = ids.astype(np.int64)
    return out


def search(state, command):
    peer, k = state["built"][command["peer"]], command["k"]
    queries = rows(command["queries"], state["dim"])
    peer.set(command["knob"])
    found, times = np.full((len(queries), k), -1, dtype="<i4"), []
    before = peer.compared()
    for number in range(len(queries)):
        query = queries[number : number + 1]
        start = time.perf_counter()
        ids = peer.search(query, k)
        times.append(time.perf_counter() - start)
        found[number] = whole(ids, 1, k)[0]
    touched = None if before is None else (peer.compared() - before) / len(queries)
    batched_us = None
    if command.get("batched"):
        start = time.perf_counter()
        peer.search(queries, k)
        batched_us = (time.perf_counter() - start) / len(queries) * 1e6
    found.tofile(command["ids"])
    reply(latency_us=float(np.median(times)) * 1e6, batched_us=batched_us, touched=touched)


def main():
    faiss.omp_set_num_threads(1)
    versions = f"faiss {faiss.__version__} ({faiss.get_compile_options().strip()}), usearch {usearch.__version__}"
    try:
        from importlib.metadata import version

        versions += f", hnswlib {version('hnswlib')}"
    except Exception:
        versions += ", hnswlib of unknown version"
    reply(ready=versions)
    state = {"built": {}}
    for line in sys.stdin:
        command = json.loads(line)
        if command["cmd"] == "quit":
            break
        if command["cmd"] == "data":
            state = {"built": {}, "dim": command["dim"], "threads": command["threads"]}
            state["keys"] = rows(command["keys"], command["dim"])
            reply(count=len(state["keys"]))
        elif command["cmd"] == "build":
            build(state, command)
        else:
            search(state, command)


try:
    main()
except Exception as error:  # The other side shows it; a traceback goes to standard error.
    reply(error=f"{type(error).__name__}: {error}")
    raise
