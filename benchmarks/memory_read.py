"""How long it takes to read so many bytes of memory, for floors under what decoding has to read for a token.

PyTorch's sums are no such floor. One stream of addresses is served at two thirds of what memory gives to a reader of several
places in turn, and ``torch.sum`` over a dimension of eight rows is no faster than over one. So a loop in C reads from several
places in turn, fetching ahead, and the shortest of some readings counts: other work on a machine only adds to it. The loop's
vectors are of 16 bytes, which every processor has in registers: a vector of 64 bytes goes through memory on one with AVX2 alone,
which took five times as long as the reading itself.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from torch import Tensor

_SOURCE = r"""
#include <stdint.h>
typedef uint64_t quarter __attribute__((vector_size(16), aligned(1)));
uint64_t read_all(const char* bytes, int64_t size, int64_t places, int64_t threads) {
  const int64_t part = size / (threads * places) / 64 * 64;
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(^ : total)
  for (int64_t thread = 0; thread < threads; thread++) {
    const char* own = bytes + thread * places * part;
    quarter first = {}, second = {}, third = {}, fourth = {};
    for (int64_t at = 0; at < part; at += 64)
      for (int64_t place = 0; place < places; place++) {
        const quarter* line = (const quarter*)(own + place * part + at);
        __builtin_prefetch((const char*)line + 512);
        first ^= line[0], second ^= line[1], third ^= line[2], fourth ^= line[3];
      }
    first ^= second ^ third ^ fourth;
    total ^= first[0] ^ first[1];
  }
  return total;
}
"""
PLACES = (1, 4, 8, 16)


def read_seconds(buffer: Tensor, size: int, *, threads: int, repeats: int = 2) -> float:
    """Seconds in which ``threads`` threads read the first ``size`` bytes of ``buffer``, the shortest over :data:`PLACES` and
    ``repeats``."""
    if size > buffer.nbytes:
        raise ValueError(f"{size} bytes were asked for; the buffer has {buffer.nbytes}.")
    read, best = _library().read_all, float("inf")
    for places in PLACES * repeats:
        began = time.perf_counter()
        read(buffer.data_ptr(), size, places, threads)
        best = min(best, time.perf_counter() - began)
    return best


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        raise SystemExit("no C compiler was found; expected cc, gcc or clang")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(_SOURCE)
        command = [compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(target))
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    library.read_all.restype = ctypes.c_uint64
    return library
