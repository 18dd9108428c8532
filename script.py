"""What all scripts do on a command line."""

import signal
import sys
from pathlib import Path


def begin() -> None:
    """Before the imports that take a second: Ctrl-C ends the program without a traceback. And text of a model that
    stdout cannot encode, where that is not UTF-8, is shown as question marks instead of ending it."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, nor where there is none
        sys.stdout.reconfigure(errors="replace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def ready() -> None:
    """After them: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def typed_path(text: str) -> Path:
    """What argparse makes of a path. A shell leaves the ~ of --out=~/x to the program."""
    return Path(text).expanduser()
