"""`python -m convert SRC DST`: see `dials_jax.convert`."""

from dials_jax.convert.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
