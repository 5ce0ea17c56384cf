"""Kernels in C for what a training step does beside its matrix products, in bfloat16 on a CPU.

torch composes a norm, a gate or a rotation of simpler operations, each a pass over the whole tensor, and its attention computes in
fp32 what bf16 instructions do at twice the rate; together that was a third of a step (docs/log.md). ``attention.c`` and ``rows.c``
make one pass of each, and ``memory.cpp`` keeps what torch frees for what it allocates next. The system's compiler makes libraries
of them for the very processor, once, in two seconds; they stay in the user's cache. Where that cannot be done, everything is
computed by torch, as it is in every other precision and on every other device: the callers in ``ops`` ask with ``takes``, and
their plain forms are what the kernels are tested against.
"""

import ctypes
import hashlib
import os
import platform
import resource
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lamina.process import of_glibc

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-fopenmp")
MEMORY_FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC")
LANES = 16
"""Numbers that a kernel takes at one time: widths are multiples of it."""

RANGE = 2**40
"""Bytes of addresses that are reserved: more than a machine that computes on its CPU has memory."""

SWITCH = "LAMINA_NATIVE"
"""Environment variable: 0 leaves everything to torch."""


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels compute with these tensors."""
    return all(available(x.device.type, x.dtype) for x in tensors)


def available(device: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels for a kind of device and a precision: for bf16 on a CPU, where there is a library."""
    return device == "cpu" and dtype == torch.bfloat16 and library() is not None


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Calls a kernel; tensors must be contiguous, None is a null pointer, and the number of threads is added."""
    getattr(library(), name)(*map(_in_c, arguments), ctypes.c_int(torch.get_num_threads()))


def _in_c(value: Tensor | int | float | None) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return value if value is None else ctypes.c_float(value) if isinstance(value, float) else ctypes.c_long(value)


def ask(name: str, *arguments: int) -> int:
    """The answer of a function that counts."""
    function = getattr(library(), name)
    function.restype = ctypes.c_long
    return int(function(*map(ctypes.c_long, arguments)))


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be made."""
    return _kernels()[0]


def about(device: str, dtype: torch.dtype) -> str:
    """For the lines that say what a run computes with: whose kernels these are, and why, where it could be otherwise."""
    if device != "cpu" or dtype != torch.bfloat16:
        return ""
    return " by compiled kernels" if library() else f" by torch's own kernels ({_kernels()[1]}; a third slower)"


def give_back() -> None:
    """Hands free memory of the process to the system, also what lies between live tensors: before its memory is measured."""
    if keep_memory.cache_info().currsize and (made := _memory()[0]) is not None:
        made.trim_arena()
    if (trim := of_glibc("malloc_trim")) is not None:
        trim(0)


@cache
def keep_memory() -> bool:
    """Lays torch's large tensors from now on where freed memory serves the next one (``memory.cpp``); whether that could be done.

    It is the whole process's memory, so only a process that is Lamina's own asks for it (``process.prepare``).
    """
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return False  # addresses are counted, and should be there for all
    made, _ = _memory()
    return made is not None and bool(made.use_arena(ctypes.c_size_t(RANGE)))


@cache
def _memory() -> tuple[ctypes.CDLL | None, str]:
    torch_folder = Path(torch.__file__).parent
    flags = [*MEMORY_FLAGS, "-isystem", str(torch_folder / "include"), f"-L{torch_folder / 'lib'}"]
    return _compiled("memory", _compiler("CXX", "c++", "g++", "clang++"), flags, "*.cpp", ["-lc10"])


@cache
def _kernels() -> tuple[ctypes.CDLL | None, str]:
    return _compiled("kernels", _compiler("CC", "cc", "gcc", "clang"), [*FLAGS], "*.c", ["-lm"])


def _compiler(variable: str, *names: str) -> str | None:
    return os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)


def _compiled(
    name: str, compiler: str | None, flags: list[str], sources: str, libraries: list[str]
) -> tuple[ctypes.CDLL | None, str]:
    """A library, made if there is none yet for this processor and this torch, or why there is none."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0"
    if compiler is None or platform.system() != "Linux":
        return None, "no C compiler" if compiler is None else "compiled on Linux only"
    folder = Path(__file__).parent
    command = [*shlex.split(compiler), *flags, *map(str, sorted(folder.glob(sources))), *libraries]
    parts = [path.read_bytes() for path in sorted(folder.glob("*.[ch]*"))]
    parts += [_processor(), torch.__version__.encode(), " ".join(command).encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamina" / f"{name}-{key}.so"
    try:
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as made:  # moved when whole: others may be making it too
                out = Path(made) / kept.name
                subprocess.run([*command, "-o", str(out)], check=True, capture_output=True, text=True)
                out.replace(kept)
        return ctypes.CDLL(str(kept)), ""
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} failed: {(error.stderr.strip() or 'it says nothing').splitlines()[0]}"
    except OSError as error:
        return None, str(error)


def _processor() -> bytes:
    """What the compiler makes the library for: a cache may be shared by machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU part")))
