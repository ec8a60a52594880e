"""How long the threads of CPU kernels spin before they sleep."""

import os
from collections.abc import MutableMapping

# Iterations, about 20 to 50 µs: longer than most gaps between two kernels of a step, far shorter than a time slice.
SPIN_COUNT = "1000"


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting OpenMP threads sleep after a short spin. Call it before torch is imported, which reads the variable.

    By default libgomp's threads spin for several milliseconds while they wait for each other. Two processes with as
    many threads as cores then spin away the time slices that the other one's threads need, and both slow down many
    times over. A choice of the user (GOMP_SPINCOUNT or OMP_WAIT_POLICY) is kept.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT
