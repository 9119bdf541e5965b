"""Which extra of the distribution installs a package that is missing."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires

DISTRIBUTION = "mfwm-kernels"
# For development; what they share with the others is also in those.
DEVELOPMENT = ("bench", "dev")
# Modules whose package has another name.
PACKAGES = {"PIL": "pillow"}


def installation(module: str) -> str:
    """What to install for a missing module, as the end of an error message; "" if no extra has it."""
    top = module.partition(".")[0]
    package = PACKAGES.get(top, top).replace("_", "-").lower()
    try:
        wanted = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return ""
    extras = []
    for requirement in wanted:
        name, extra = re.match(r"[\w.-]*", requirement), re.search(r"""extra == ['"]([\w-]+)['"]""", requirement)
        if name and extra and name[0].lower() == package and extra[1] not in DEVELOPMENT:
            extras.append(f"pip install '{DISTRIBUTION}[{extra[1]}]'")
    return f": {' or '.join(extras)}" if extras else ""
