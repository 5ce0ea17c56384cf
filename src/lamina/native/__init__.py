"""Kernels in C for a training step, and for generation, in bfloat16 on a CPU.

torch composes a norm, a gate or a rotation of simpler operations, each a pass over the whole tensor, its attention computes in
fp32 what bf16 instructions do at twice the rate, and a sum of matrix products is rounded after each of them (docs/log.md).
``attention.c`` and ``rows.c`` make one pass of each; ``products.c`` and, over a weight in int8, ``integers.c`` take the whole sum.
Generation needs a sum of few rows, ``few.c``, and attention over a cache, ``cached.c``. ``memory.cpp`` keeps what torch frees for what
it allocates next. The system's compiler makes libraries of them for the very
processor, once, in some seconds; they stay in the user's cache. Where that cannot be done, everything is computed by torch, as it
is in every other precision and on every other device: the callers in ``ops`` ask with ``takes``, and their plain forms are what the
kernels are tested against.
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
from typing import Any

import torch
from torch import Tensor

from lamina.process import PREPARED, of_glibc

FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
    "-fopenmp",
)
MEMORY_FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC")
LANES = 16
"""Numbers that a kernel takes at one time: widths are multiples of it."""

RANGE = 2**40
"""Bytes of addresses that are reserved: more than a machine that computes on its CPU has memory."""

COMPILING = 120
"""Seconds after which the compiler is given up."""

SWITCH = "LAMINA_NATIVE"
"""Environment variable: 0 leaves everything to torch."""

Argument = Tensor | int | float | ctypes.c_void_p | ctypes.Array[Any] | None
"""What a kernel takes."""


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels compute with these tensors."""
    for x in tensors:  # a loop, because generation asks some hundred times for every token
        if not (x.is_cpu and x.dtype is torch.bfloat16):
            return False
    return library() is not None


def available(device: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels for a kind of device and a precision: for bf16 on a CPU, where there is a library."""
    return device == "cpu" and dtype == torch.bfloat16 and library() is not None


def call(name: str, *arguments: Argument, threads: int | None = None) -> None:
    """Calls a kernel, on all of torch's threads or on fewer; None is a null pointer, and what is ctypes' goes as it is.

    Raises:
        ValueError: a tensor is not contiguous, or elsewhere: a kernel would take its memory for another tensor's.
    """
    function = getattr(library(), name)
    if function.argtypes is None:
        function.argtypes = [*map(_type, arguments), ctypes.c_int]
    values = [_address(value) if isinstance(value, Tensor) else value for value in arguments]
    function(*values, threads or torch.get_num_threads())


def _address(x: Tensor) -> int:
    if not (x.is_cpu and x.is_contiguous()):
        raise ValueError(
            f"found a tensor {list(x.shape)} with strides {x.stride()} on {x.device}, expected a contiguous one on the CPU"
        )
    return x.data_ptr()


def _type(value: Argument) -> type:
    """What a kernel's argument is, as the first call tells it: in every call the same."""
    if isinstance(value, int | float):
        return ctypes.c_float if isinstance(value, float) else ctypes.c_long
    return ctypes.c_void_p


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
    if library() and keep_memory.cache_info().currsize and not keep_memory():
        return f" by compiled kernels, in torch's own memory ({_memory()[1] or 'memory or addresses are limited'})"
    return " by compiled kernels" if library() else f" by torch's own kernels ({_kernels()[1]}; a third slower)"


def give_back() -> None:
    """Hands free memory of the process to the system, also what lies between live tensors: before its memory is measured."""
    if keep_memory.cache_info().currsize and keep_memory() and (made := _memory()[0]) is not None:
        made.trim_arena()
    if (trim := of_glibc("malloc_trim")) is not None:
        trim(0)


def own_memory(device: torch.device) -> None:
    """Asks for ``keep_memory`` where a process that is Lamina's own computes on a CPU."""
    if device.type == "cpu" and PREPARED.is_set():
        keep_memory()


@cache
def keep_memory() -> bool:
    """Lays torch's large tensors from now on where freed memory serves the next one (``memory.cpp``); whether that could be done.

    It is the whole process's memory, so only a process that is Lamina's own asks for it (``process.prepare``).
    """
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    if any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits):
        return False  # what is kept would count against the limit, though it is free
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
    try:
        command = [*shlex.split(compiler), *flags, *map(str, sorted(folder.glob(sources))), *libraries]
        parts = [path.read_bytes() for path in sorted(folder.glob("*.[ch]*"))]
        parts += [_processor(), torch.__version__.encode(), " ".join(command).encode()]
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        kept = _own_folder() / f"{name}-{key}.so"
        if not kept.exists():
            _make(command, kept)
        return ctypes.CDLL(str(kept)), ""
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} failed: {(error.stderr.strip() or 'it says nothing').splitlines()[0]}"
    except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:  # of disk, home folder and command
        return None, str(error)


def _own_folder() -> Path:
    """The folder of compiled libraries: code that is run, so nobody else may write there.

    Raises:
        OSError: it belongs to another user, or others may write there.
        RuntimeError: there is no home folder.
    """
    asked = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(asked) if os.path.isabs(asked) else Path.home() / ".cache") / "lamina"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder}: others may write there")
    return folder


def _make(command: list[str], kept: Path) -> None:
    """Compiles into a folder beside the library's place and moves it there when it is whole: others may be making it too."""
    with tempfile.TemporaryDirectory(dir=kept.parent) as made:
        out = Path(made) / kept.name
        subprocess.run(
            [*command, "-o", str(out)], check=True, capture_output=True, text=True, errors="replace", timeout=COMPILING
        )
        with out.open("rb") as library:
            os.fsync(library.fileno())
        out.replace(kept)


def _processor() -> bytes:
    """What the compiler makes the library for: a cache may be shared by machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU part")))
