"""Where the arithmetic runs and in which precision: what `auto` means for device, dtype and compile. And how
a processor's memory is kept: what is freed, and in which pages."""

import contextlib
import ctypes
import mmap
import time
from pathlib import Path

import torch

from configurator import PRECISIONS
from words import first_line

DTYPES = {name: getattr(torch, name) for name in PRECISIONS}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA (one GPU per local rank), then MPS, then the CPU. Raises ValueError for one that is not there."""
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = f"cuda:{local_rank}" if cuda else "mps" if mps else "cpu"
    device = check_device(name)
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device={name} cannot be used here: there are cpu, cuda and mps")
    return device


def check_device(device: str | torch.device) -> torch.device:
    """The same, if it is there. Raises ValueError if it is not."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except Exception as error:  # each backend has errors of its own
        raise ValueError(f"device={device} cannot be used here: {first_line(error)}") from None
    return found


def pick_dtype(name: str, device: torch.device) -> tuple[str, str]:
    """The precision of matrix products and, in a few words, why. Weights stay float32 while training."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "the GPU has it") if hardware else ("float16", "the GPU has no bfloat16")
    if device.type == "cpu":
        gain = bfloat16_gain()
        verdict = f"bfloat16 matrix products measured {gain:.1f} x as fast as float32 ones"
        # Casting weights and activations costs time too; a gain that small would not survive it.
        return ("bfloat16" if gain > 1.3 else "float32"), verdict
    return "float32", f"no measured gain on {device.type}"


def bfloat16_gain() -> float:
    """How many times faster than float32 this CPU multiplies bfloat16 matrices; well under a second.

    A processor without the instructions emulates them and comes out below 1, so this needs no list of processors. It
    takes the processor time of one thread: a second run that starts meanwhile would slow the clock of one dtype alone.
    """
    size, repeats = 768, 10
    spent, threads = {}, torch.get_num_threads()
    tick = time.get_clock_info("thread_time").resolution  # as long as several products on Windows
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.ones(size, size, dtype=dtype)
            a @ a  # the first is prepared for
            start = time.thread_time()
            for _ in range(repeats):
                a @ a
            spent[dtype] = max(tick, time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return spent[torch.float32] / spent[torch.bfloat16]


def pick_compile(setting: str, device: torch.device) -> tuple[bool, str]:
    """Whether to torch.compile, and why. On a CPU, eager is as fast once `keep_freed_memory` is in force."""
    if setting == "false":
        return False, "as asked"
    if setting == "auto" and device.type != "cuda":
        return False, f"no measured gain on {device.type}"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a version too new: the compiler's own words are best
        reason = f"torch.compile does not work here ({type(error).__name__}: {first_line(error)[:100]})"
        if setting == "true":
            raise ValueError(f"compile=true, but {reason}") from None
        return False, reason
    return True, "as asked" if setting == "true" else "it works on this GPU"


def autocast(device: torch.device, dtype: str, hold: bool = True) -> contextlib.AbstractContextManager:
    """PyTorch's; with `hold` it casts a weight once, and keeps that until it ends."""
    return torch.autocast(device.type, DTYPES[dtype], dtype != "float32", cache_enabled=None if hold else False)


def keep_freed_memory() -> None:
    """Tell glibc, where that is in use, to keep large freed buffers instead of returning each to the kernel.

    A training step on the CPU frees and allocates the same few hundred megabytes over and over, and faulting the pages
    in again takes as long as the arithmetic: without this, the small preset trains at half the speed. The price is a
    peak about a quarter higher, since what one step leaves in pieces the next cannot always use.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
    with contextlib.suppress(OSError):  # not glibc: macOS, musl, Windows
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # all that older ones take
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # -1: never


PIECE, PIECES = 1 << 29, 8  # 4 GiB; malloc would map a piece of 1 GiB outside the heap, as `keep_freed_memory` has it


def use_huge_pages() -> None:
    """Have Linux, where glibc is in use, hold the next 4 GiB that are allocated in pages of 2 MiB, not 4 KiB.

    A processor looks up every page that it reads: weights are read from end to end at each token, and products of a
    training step go across the rows of large matrices, each in a page of its own. So much is allocated at the end of
    the heap, marked and freed untouched: malloc gives the same addresses out later, and until then they take no memory.
    Where `ulimit` or the kernel counts addresses too, nothing is done.
    """
    keep_freed_memory()
    with contextlib.suppress(ImportError, OSError, RuntimeError):  # not Linux, or no such addresses
        import resource

        libc = ctypes.CDLL("libc.so.6")
        limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
        strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
        if strict or limits != [resource.RLIM_INFINITY] * 2:
            return
        pieces = [torch.empty(PIECE, dtype=torch.uint8) for _ in range(PIECES)]
        for piece in pieces:
            start = -(-piece.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(PIECE - mmap.PAGESIZE), mmap.MADV_HUGEPAGE)


def release_freed_memory() -> None:
    """Give back to the kernel what lies free between things in use; the addresses behind them stay marked."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(ctypes.c_size_t(PIECE * PIECES))
