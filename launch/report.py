"""One page about output folders, and a model card. `python launch/report.py --help` lists the options."""

from minitron_megatron.config import ReportConfig
from minitron_megatron.launcher import command


def main(cfg: ReportConfig) -> None:
    """Heavy imports wait until the options are checked."""
    from minitron_megatron.report.report import report

    report(cfg)


if __name__ == "__main__":
    command(main, "report")
