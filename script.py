"""What all scripts do on a command line."""

import signal
import sys
from collections.abc import Callable

from words import first_line


def begin() -> None:
    """Call it before the slow imports: Ctrl-C ends the program without a traceback, and see `forgive_stdout`."""
    forgive_stdout()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def forgive_stdout() -> None:
    """Have stdout show a question mark for a character that it cannot encode, instead of failing."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, nor where there is none
        sys.stdout.reconfigure(errors="replace")


def ready() -> None:
    """Call it after the slow imports: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(name: str, work: Callable[[], int | None], interrupted: str = "") -> int:
    """Do the work of the script `name`, and return its exit code: what `work` gives, or 0 for None; 1 with one sentence
    on stderr for what a user has caused; 130 after Ctrl-C, which `interrupted` may say a word about."""
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{name}: there is not enough memory ({wanted(error)})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if interrupted:
            print(f"{name}: interrupted; {interrupted}", file=sys.stderr)
        return 130


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is what Python or PyTorch, of which nothing is imported here, raises for want of memory."""
    plain = isinstance(error, RuntimeError) and any(map(speaks_of_memory, str(error).splitlines()))
    return plain or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def wanted(error: Exception) -> str:
    """The line that speaks of memory, for TorchScript says first where it was, or else the first line."""
    return next(filter(speaks_of_memory, str(error).splitlines()), None) or first_line(error)


def speaks_of_memory(line: str) -> bool:
    return "can't allocate memory" in line.lower() or "cannot allocate memory" in line.lower()
