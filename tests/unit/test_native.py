"""How the kernels come to be: made once for a processor and kept, and done without where they cannot be made."""

import os
import platform
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from lamina import native
from lamina.ops.norm import rms_norm

COUNT = (
    "from lamina import native; import torch; print(native.library() is not None, native.about('cpu', torch.bfloat16))"
)
needs_kernels = pytest.mark.skipif(native.library() is None, reason="no C compiler, so no kernels")

needs_memory = pytest.mark.skipif(
    native._memory()[0] is None or resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY,
    reason="no C++ compiler, or memory is limited, so torch's allocator",
)


def ran(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are asked for as in a new process."""
    monkeypatch.setattr(native, "_kernels", cache(native._kernels.__wrapped__))


@pytest.mark.slow
@needs_kernels
def test_made_once_and_kept(tmp_path: Path) -> None:
    assert ran(COUNT, XDG_CACHE_HOME=str(tmp_path)) == "True  by compiled kernels"
    (kept,) = (tmp_path / "lamina").iterdir()
    assert kept.name.startswith("kernels-")
    before = kept.stat().st_mtime_ns
    assert ran(COUNT, XDG_CACHE_HOME=str(tmp_path)) == "True  by compiled kernels"
    assert [path.stat().st_mtime_ns for path in (tmp_path / "lamina").iterdir()] == [before]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"LAMINA_NATIVE": "0"}, "LAMINA_NATIVE=0"),
        ({"CC": "no-such-compiler"}, "No such file or directory"),
        ({"CC": "false"}, "false failed: it says nothing"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "Not a directory"),
        ({"CC": '"unfinished'}, "No closing quotation"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="compiled on Linux only")
@pytest.mark.usefixtures("anew")
def test_without_kernels_torch_computes_and_the_reason_is_told(
    environment: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"XDG_CACHE_HOME": str(tmp_path)} | environment).items():
        monkeypatch.setenv(name, value)
    assert native.library() is None
    told = native.about("cpu", torch.bfloat16)
    assert told.startswith(" by torch's own kernels (") and reason in told
    x = torch.linspace(-3, 3, 64).reshape(2, 32).bfloat16().requires_grad_()
    out = rms_norm(x, torch.ones(32).bfloat16(), 1e-5)
    out.sum().backward()
    assert out.float().square().mean().item() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda", torch.bfloat16), ("cpu", torch.float32), ("cpu", torch.float16)]
)
def test_other_devices_and_precisions_are_torchs(device: str, dtype: torch.dtype) -> None:
    assert not native.available(device, dtype)
    assert native.about(device, dtype) == ""


EMULATED = """
import ctypes, sys
import torch
from lamina import native
from lamina.ops import int8
from lamina.ops.attention import attend_causally, attend_plainly
from lamina.ops.cache import Cache
from lamina.ops.frozen import SharedBuffer
from lamina.ops.loss import cross_entropy_sum

made = ctypes.CDLL(sys.argv[1])
native.library = lambda: made
torch.manual_seed(0)
for tokens, width in ((1, 16), (23, 48), (70, 64)):
    q, k, v = (torch.randn(tokens, heads, width).bfloat16().requires_grad_() for heads in (4, 2, 2))
    ours, plain = attend_causally(q, k, v, [tokens]), attend_plainly(q.float(), k.float(), v.float())
    upstream = torch.randn(tokens, 4, width)
    for one, other in zip([ours, *torch.autograd.grad(ours, (q, k, v), upstream.bfloat16())],
                          [plain, *torch.autograd.grad(plain, (q, k, v), upstream)]):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.03, atol=0.03)
    both = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(tokens)
        q, k, v = (torch.randn(tokens + 1, heads, width).bfloat16().to(dtype) for heads in (4, 2, 2))
        cache = Cache([tokens], 1, layers=1, kv_heads=2, head_width=width, dtype=dtype, device=torch.device("cpu"))
        cache.prefill(range(1))(0, q[:-1], k[:-1], v[:-1], None)
        both.append(cache(0, q[-1:], k[-1:], v[-1:], None).float())
    torch.testing.assert_close(*both, rtol=0.01, atol=0.01)
hidden, vocabulary = torch.randn(8, 16).bfloat16().requires_grad_(), torch.randn(37, 16).bfloat16()
total, _ = cross_entropy_sum(hidden, vocabulary, torch.arange(8))
expected = torch.nn.functional.cross_entropy(hidden.float() @ vocabulary.float().t(), torch.arange(8), reduction="sum")
torch.testing.assert_close(total, expected, rtol=0.01, atol=0.01)
form = int8.Int8(70, 50, torch.bfloat16, scratch=SharedBuffer())
form.store(torch.randn(70, 50))
x, bias = torch.randn(101, 50).bfloat16(), torch.randn(70).bfloat16()
a, b = torch.randn(50, 8).bfloat16().t(), torch.randn(8, 70).bfloat16()
outcomes = []
for here in (int8._here, lambda: False):
    int8._here = here
    out = form.multiply(x, bias)
    narrow = x[:, :8]
    outcomes.append((out, form.multiply_back(out), form.multiply(x, bias, (narrow, b)), form.multiply_back(out, (narrow, a))))
for one, other, rtol in zip(*outcomes, (0, 0, 0.02, 0.02)):
    torch.testing.assert_close(one, other, rtol=rtol, atol=8 * rtol)
print("as torch")
"""


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of its compilers")
@pytest.mark.parametrize(
    "flags", [["-mno-avx512f"], ["-mno-avx512bf16"], ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover"]]
)
def test_other_processors_compute_the_same_and_no_compiler_warns(flags: list[str], tmp_path: Path) -> None:
    """0.03: bf16's ε is 0.008, of numbers of about one that were rounded two or three times."""
    sources = sorted(map(str, Path(native.__file__).parent.glob("*.c")))
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    command = ["cc", *native.FLAGS, *strict, *flags, *sources, "-o", str(tmp_path / "k.so"), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", EMULATED, str(tmp_path / "k.so")], capture_output=True, text=True, check=False
    )
    assert done.stdout == "as torch\n", done.stderr


@needs_kernels
@pytest.mark.usefixtures("anew")
def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lamina").mkdir()
    (tmp_path / "lamina").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "others may write there" in native.about("cpu", torch.bfloat16)


@needs_kernels
def test_a_tensor_that_is_not_contiguous_is_refused() -> None:
    x = torch.zeros(32, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="expected a contiguous one"):
        native.call("gate", x.t(), x, torch.empty_like(x), 1024)
    with pytest.raises(ValueError, match="on meta, expected a contiguous one on the CPU"):
        native.call("gate", x, x, torch.empty_like(x, device="meta"), 1024)


MEMORY = """
import resource, sys
import torch
from lamina import native

torch.set_num_threads(1)
early = torch.ones(1_000_000)
if sys.argv[1] == "kept":
    assert native.keep_memory()
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = pages()
for _ in range(10):
    a, b = torch.ones(2_000_000), torch.ones(4_000_000)  # 8 and 16 MB, freed again
    small = torch.ones(10)
del early, a, b  # of either kind
print(pages() - before)
x = torch.randn(1000, 1000)
x.resize_(3000, 1000)[1000:] = 1
assert x[:1000].std() > 0.9 and (x[1000:] == 1).all()
"""


@needs_memory
@pytest.mark.slow
def test_freed_memory_serves_the_next_tensor() -> None:
    """Faults: those of the first two tensors in huge or in small pages, and none of the 18 others; torch's own all of them."""
    faults = {}
    for name in ("kept", "as it comes"):
        # Or glibc may keep them too, or may not, and huge pages would be few faults.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "THP_MEM_ALLOC_ENABLE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, name], env=environment, capture_output=True, text=True, check=True
        )
        faults[name] = int(done.stdout.split()[0])
    pages = 24_000_000 // 4096
    assert faults["kept"] < 1.5 * pages
    assert faults["as it comes"] > 5 * pages


HOLES = """
import random
import torch
from lamina import native

assert native.keep_memory()
random.seed(0)
alive, bytes_alive, most = {}, 0, 0
before = int(open("/proc/self/statm").read().split()[1]) * 4096
for turn in range(3000):
    if alive and random.random() < 0.5:
        number = random.choice(list(alive))
        tensor = alive.pop(number)
        assert (tensor == number % 251).all(), "another tensor wrote here"
        bytes_alive -= len(tensor)
        del tensor
    else:
        size = random.choice([100, 70_000, 70_001, 500_000, 1_000_003])
        alive[turn] = torch.full((size,), turn % 251, dtype=torch.uint8)
        bytes_alive += size
        most = max(most, bytes_alive)
for number, tensor in alive.items():
    assert (tensor == number % 251).all()
alive.clear()
del tensor
whole = torch.empty(most, dtype=torch.uint8)  # neighbouring holes are one: all that was free holds the whole again
resident = int(open("/proc/self/statm").read().split()[1]) * 4096 - before
print(most, resident)
"""


@pytest.mark.slow
@needs_memory
def test_tensors_do_not_overlap_and_holes_close() -> None:
    """At random, the worst case: half as much again in holes; huge pages and torch's own first allocations beside it."""
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    most, resident = map(int, done.stdout.split())
    assert resident < 1.5 * most + 20e6


@pytest.mark.slow
@needs_memory
@pytest.mark.parametrize("order", ["range(20)", "reversed(range(20))", "[*range(0, 20, 2), *range(1, 20, 2)]"])
def test_neighbouring_holes_are_one_in_whatever_order_they_came(order: str) -> None:
    """What 20 tensors leave holds one of their size: no new memory, but for a few pages of Python's own."""
    code = f"""
import torch
from lamina import native
assert native.keep_memory()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
torch.set_num_threads(1)
torch.ones(100_000, dtype=torch.uint8)
tensors = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(20)]
before = resident()
for number in {order}:
    tensors[number] = None
whole = torch.ones(20 << 20, dtype=torch.uint8)
print(resident() - before)
"""
    assert int(ran(code)) < 2 << 20


@pytest.mark.slow
@needs_memory
def test_the_profiler_sees_tensors_as_before() -> None:
    code = """
import sys
import torch
from lamina import native
if sys.argv[1] == "kept":
    assert native.keep_memory()
with torch.profiler.profile(profile_memory=True) as profiler:
    x = torch.empty(1_000_000)
    y = torch.empty(100)
    del x
print(sorted(event.cpu_memory_usage for event in profiler.events() if event.cpu_memory_usage))
"""
    seen = [
        subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True).stdout
        for name in ("kept", "as it comes")
    ]
    assert "4000000" in seen[0] and seen[0] == seen[1]


@pytest.mark.slow
@needs_memory
def test_where_addresses_are_limited_torch_keeps_its_own() -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35)); from lamina import native; print(native.keep_memory())"
    assert ran(code) == "False"


@pytest.mark.slow
@needs_memory
def test_no_memory_is_told_as_torch_tells_it() -> None:
    code = """
import torch
from lamina import native
assert native.keep_memory()
try:
    torch.empty(2**50, dtype=torch.uint8)
except RuntimeError as error:
    print(error)
torch.ones(1_000_000)
"""
    assert "allocate memory" in ran(code)


@pytest.mark.slow
@needs_memory
def test_live_tensors_stay_when_free_memory_is_given_back_and_threads_allocate_at_once() -> None:
    code = """
import threading
import torch
from lamina import native
assert native.keep_memory()
faults = []
def work(number):
    for turn in range(200):
        tensors = [torch.full((size,), number, dtype=torch.uint8) for size in (70_001, 100_000, 300_003)]
        del tensors[1]
        if turn % 20 == 0:
            native.give_back()
        if not all((tensor == number).all() for tensor in tensors):
            faults.append(number)
threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(faults)
"""
    assert ran(code) == "[]"


@pytest.mark.slow
@needs_memory
def test_a_forked_process_can_allocate() -> None:
    code = """
import os, threading
import torch
from lamina import native
assert native.keep_memory()
going = True
def busy():
    while going:
        torch.empty(100_000)
threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads: thread.start()
ends = []
for _ in range(30):
    child = os.fork()
    if not child:
        torch.ones(100_000)
        os._exit(0)
    ends.append(os.waitpid(child, 0)[1])
going = False
for thread in threads: thread.join()
print(set(ends))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "{0}"
