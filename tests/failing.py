"""A command of launch/ in which something happens on one rank: `python tests/failing.py NAME RANK WHERE WHAT option=value …`.

WHERE: "start", before the options are checked, or the number of a training step, after the collectives of those before it.
WHAT: "mistake" (UserError), "bug" (ValueError), "kill" (SIGKILL), "exit" (status 3 without a word), "slow" (says so, and waits),
"nothing"; one for each start of the job by torchrun, as "bug,nothing".
"""

import os
import signal
import sys
import time
from typing import Any

from minitron_megatron.cli.commands import Command
from minitron_megatron.cli.main import command
from minitron_megatron.errors import UserError


def happen(whats: str) -> None:
    """What is to happen in this start of the job; the last is for all that come after."""
    start, each = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), whats.split(",")
    match each[min(start, len(each) - 1)]:
        case "mistake":
            raise UserError("this rank's folder is damaged: copy it again")
        case "bug":
            raise ValueError("a bug of this rank")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "slow":
            print("slow", flush=True)
            time.sleep(600)


def main() -> None:
    """Run the command with its surprise."""
    name, rank, where, what, *words = sys.argv[1:]
    sys.argv[1:] = words
    if int(os.environ.get("RANK", "0")) == int(rank):
        if where == "start":
            run = Command.__call__

            def surprised(self: Command, config: Any) -> None:
                happen(what)
                run(self, config)

            Command.__call__ = surprised
        else:
            from minitron_megatron.train.loop import Trainer

            train_step = Trainer.train_step

            def step_or_surprise(self: Trainer, step: int, *rest: Any) -> Any:
                if step == int(where):
                    happen(what)
                return train_step(self, step, *rest)

            Trainer.train_step = step_or_surprise
    command(name)


if __name__ == "__main__":
    main()
