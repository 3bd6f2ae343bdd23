"""Runs a command of the package in this process, as `python -m` would in one of its own."""

import logging
import runpy
import sys

import pytest
from absl import flags


def run_command(module, *arguments, package="cassle_jax"):
    """`python -m PACKAGE.MODULE arguments…`; returns its exit code.

    absl's own set-up of the process, which happens once, is left out, as is the command's log.
    """
    known, ours = set(flags.FLAGS), logging.getLogger("cassle_jax")

    def absl_run(main, flags_parser):
        main(flags_parser(sys.argv))
        sys.exit()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("absl.app.run", absl_run)
        patch.setattr("cassle_jax.command.set_up_logging", lambda: None)
        patch.setattr(sys, "argv", [module, *arguments])
        # The tests' import hook would leave its own code where other processes look for theirs.
        patch.setattr(sys, "dont_write_bytecode", True)
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_module(f"{package}.{module}", run_name="__main__")
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
    assert ours.propagate
    return ended.value.code or 0
