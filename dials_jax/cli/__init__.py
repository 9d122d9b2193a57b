"""The command `dials`. Modules here import the library inside functions: --help waits for none."""
