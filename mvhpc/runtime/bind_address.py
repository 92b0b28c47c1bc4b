"""At which address programs listen that would do so at all of a machine's.

Ray's servers (2.60; bound to the node's address upstream twice, and taken back: ray-project/ray #55484, #59852) and the
store in which PyTorch's workers find one another cannot be told another. ``listening.c``, compiled where mvhpc is
installed, tells the C library for them.
"""

import importlib.util
import os
from collections.abc import Mapping


def only_at(ip: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables with which a command, and all that it starts, listens at ``ip`` instead of everywhere.

    Args:
        ip: an IPv4 address of this machine.
        environment: what the command would have without them.

    Returns:
        what to add to it; nothing where no C compiler was at hand when mvhpc was installed, or where the path to it is
        none that LD_PRELOAD can name.
    """
    built = importlib.util.find_spec("mvhpc.runtime._bind_address")
    if built is None or built.origin is None or set(built.origin) & {" ", ":"}:
        return {}
    before = environment.get("LD_PRELOAD", "")
    return {"MVHPC_LISTEN": ip, "LD_PRELOAD": f"{built.origin}:{before}" if before else built.origin}
