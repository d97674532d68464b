"""What was tried, how often, and what was lost."""

from dataclasses import dataclass, field

from tests.soak.work import SAVE_EVERY


@dataclass
class Kill:
    """One kill: where it found the run, and how many steps have to be done again (None: at most the save interval)."""

    phase: str
    lost: int | None
    what: str = "run"


@dataclass
class Report:
    """What was tried with one architecture, or with one number of processes."""

    what: str
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    compared: int = 0
    differences: list[str] = field(default_factory=list)
    slowest_end: float = 0.0


def table(reports: list[Report]) -> str:
    """Kills by phase, what was done again, and whether anything differs."""
    rows = [f"{'trained':<24}{'killed in':<18}{'kills':>6}{'steps again, mean':>19}{'most':>6}"]
    for report in reports:
        for phase in dict.fromkeys(sorted(kill.phase for kill in report.kills)):
            lost = [kill.lost for kill in report.kills if kill.phase == phase]
            known = [steps for steps in lost if steps is not None]
            again = f"{sum(known) / len(known):>19.1f}{max(known):>6}" if known else f"{f'≤ {SAVE_EVERY}':>25}"
            rows.append(f"{report.what:<24}{phase:<18}{len(lost):>6}{again}")
        ends = f", all processes gone within {report.slowest_end:.1f} s" if report.slowest_end else ""
        rows.append(
            f"{report.what:<24}{'all':<18}{len(report.kills):>6}   {report.runs} runs{ends}, {report.compared} values "
            f"each: {len(report.differences)} differ"
        )
    return "\n".join(rows)
