"""The command line: mfwm collect | data | describe | train... | encode | evaluate | play | export | demo.

An error in the arguments or the data prints one line and exits with code 2. --traceback, or MFWM_TRACEBACK=1, shows
where it was raised.
"""

from __future__ import annotations

import argparse
import dis
import logging
import os
import sys
import warnings

from .extras import installation

# Values of MFWM_TRACEBACK that mean no.
OFF = ("", "0", "false", "no", "off")


def main() -> None:
    traceback = os.environ.get("MFWM_TRACEBACK", "").lower() not in OFF
    try:
        # Imported here, so that Ctrl-C is handled during the seconds that torch takes to load.
        from .commands import command_of
        from .presets import PRESETS

        # Parse the preset first, because it sets the defaults of all other flags.
        first = argparse.ArgumentParser(prog="mfwm", add_help=False, allow_abbrev=False)
        first.add_argument("--preset", choices=list(PRESETS), default="plain")
        first.add_argument("--traceback", action="store_true")
        chosen, rest = first.parse_known_args()
        traceback = traceback or chosen.traceback
        command_of(chosen.preset, rest, __doc__).run()
    except KeyboardInterrupt:
        # At exit, interrupted tasks of Zarr log warnings, and its exit handler fails if its thread was just starting.
        warnings.simplefilter("ignore")
        logging.disable()
        sys.unraisablehook = lambda _: None
        print("mfwm: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if traceback or not expected(error):
            raise
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        advice = installation(missing) if missing else ""
        print(f"mfwm: {' '.join(str(error).split()) or type(error).__name__}{advice}", file=sys.stderr)
        raise SystemExit(2) from None


def expected(error: Exception) -> bool:
    """Whether an error is about the user's input or the machine, rather than a fault in this program."""
    if isinstance(error, ValueError | OSError | ImportError):
        return True
    if not isinstance(error, TypeError | RuntimeError | ArithmeticError) or error.__traceback__ is None:
        return False
    # These are expected if this package raises them with a raise statement; from elsewhere they show its faults.
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    package = last.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    raised = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return package in ("mfwm", "mfwm_kernels") and raised


if __name__ == "__main__":
    main()
