"""Runs every policy x cache x sampler in 8 bits and compares each with the plain decoder.

    python -m tests.eight_bits                       each in int8 on one model, in fp8 on the other
    python -m tests.eight_bits --weights int8 fp8    each in both
    python -m tests.eight_bits --models llada_tiny   one model only

What is compared, and how closely, is said in tests/eight_bits/followed.py. Prints a line for every
composition and the counts; ends with status 1 if one is not as it should be.
"""

import argparse
import sys
import time
from collections import Counter

import numpy as np
from jaxtyping import config as jaxtyping_config

from tests.conftest import forget_many_programs
from tests.eight_bits.compositions import KINDS, MODELS, check, compositions


def main():
    parser = argparse.ArgumentParser(
        "tests.eight_bits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--weights", nargs="+", choices=KINDS, help="all in these")
    given = parser.parse_args()
    jaxtyping_config.update("jaxtyping_disable", True)  # a third of the time; other tests check it
    counts, start, processor = Counter(), time.monotonic(), time.process_time()
    for composition in compositions(given.models, given.weights):
        forget_many_programs()
        kind, words = outcome(composition, counts)
        counts[kind] += 1
        print(f"{kind}: {', '.join(composition)}{words}", flush=True)
    print(f"\n{dict(counts)}")
    print(f"{time.monotonic() - start:.0f} s, {time.process_time() - processor:.0f} s of CPU time")
    sys.exit(counts["failed"] > 0)


def outcome(composition, counts):
    """How a composition ended, and what was seen; adds what was compared to the counts."""
    try:
        compared = check(composition)
    except Exception as error:
        return "failed", f": {type(error).__name__}: {error}"
    if compared is None:
        return "refused", ""
    counts["decisions"] += compared.decisions
    counts["near-ties"] += compared.near_ties
    errors = np.array(compared.errors)
    counts["tokens"] += len(errors)
    median, largest = np.median(errors), np.max(errors)
    close = f"{compared.near_ties} of {compared.decisions} decisions were near-ties"
    return "equal", f": {close}; nats off: {median:.1g}, at most {largest:.2g}"


if __name__ == "__main__":
    main()
