"""The command line: mfwm collect | data | describe | train... | encode | evaluate | export | demo.

A mistake is answered by one line and exit code 2; --traceback, or MFWM_TRACEBACK=1, shows where it was found.
"""

from __future__ import annotations

import argparse
import dis
import logging
import os
import sys
import warnings

# What MFWM_TRACEBACK says for no.
OFF = ("", "0", "false", "no", "off")


def main() -> None:
    traceback = os.environ.get("MFWM_TRACEBACK", "").lower() not in OFF
    try:
        # Torch takes seconds to load, in which Ctrl-C is answered too.
        from .commands import command_of
        from .presets import PRESETS

        # The preset comes first: it decides the defaults of all the other flags.
        first = argparse.ArgumentParser(prog="mfwm", add_help=False, allow_abbrev=False)
        first.add_argument("--preset", choices=list(PRESETS), default="plain")
        first.add_argument("--traceback", action="store_true")
        chosen, rest = first.parse_known_args()
        traceback = traceback or chosen.traceback
        command_of(chosen.preset, rest, __doc__).run()
    except KeyboardInterrupt:
        # Zarr's tasks that are broken off in the middle complain when Python ends.
        warnings.simplefilter("ignore")
        logging.disable()
        print("mfwm: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if traceback or not expected(error):
            raise
        print(f"mfwm: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        raise SystemExit(2) from None


def expected(error: Exception) -> bool:
    """Whether an error is about what the user gave, or what the machine has, rather than about this program."""
    if isinstance(error, ValueError | OSError | ImportError):
        return True
    if not isinstance(error, TypeError | RuntimeError | ArithmeticError) or error.__traceback__ is None:
        return False
    # The others are expected where this package raises them in so many words; from elsewhere they are its faults.
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    package = place.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    raised = place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return package in ("mfwm", "mfwm_kernels") and raised


if __name__ == "__main__":
    main()
