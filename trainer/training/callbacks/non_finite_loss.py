"""The end of a training whose loss is no number."""

import math


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the weights of the step before are untouched."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__(f"the loss became {'NaN' if math.isnan(value) else 'infinite'} at step {step}")
        self.step = step
