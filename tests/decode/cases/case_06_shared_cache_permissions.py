"""TELLTALE_CACHE shared by users: what one compiled the others must be able to read (it is 0711 now, so dlopen is refused and decoding is silently slow)."""
import os, stat, subprocess, sys, tempfile
from pathlib import Path
os.environ["OMP_NUM_THREADS"] = "1"
with tempfile.TemporaryDirectory() as folder:
    os.umask(0o022); os.environ["TELLTALE_CACHE"] = folder
    from telltale.models.backends.native import build
    build.library()
    mode = stat.S_IMODE(next(Path(folder).glob("*.so")).stat().st_mode)
    print(f"mode of the compiled library under umask 022: {mode:o} (expected readable by others)")
    sys.exit(not mode & stat.S_IROTH)
