"""Seconds in words."""


def duration(seconds: float) -> str:
    """What was measured, in hours, minutes and seconds: 1 h 2 min, 0 min 34 s, 0.4 s."""
    if 0.05 <= seconds < 1:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def rough_duration(seconds: float) -> str:
    """What is estimated, in one unit: 90 s, 62 min, 2.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
