"""Run a script that dies in the middle of saving a checkpoint, as by `kill -9`.

python killed_run.py NAME_OF_CHECKPOINT SCRIPT OPTIONS...
"""

import os
import runpy
import signal
import sys

import accelerate.accelerator

save_custom_state = accelerate.accelerator.save_custom_state


def save_or_die(thing, path, index, *rest, **options):
    # Of what the script registers, the second: model and optimizer are written by then.
    if index == 1 and deadly in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    save_custom_state(thing, path, index, *rest, **options)


deadly, *sys.argv = sys.argv[1:]
accelerate.accelerator.save_custom_state = save_or_die
runpy.run_path(sys.argv[0], run_name="__main__")
