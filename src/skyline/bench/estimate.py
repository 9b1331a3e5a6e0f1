"""A number with what it is worth."""

from __future__ import annotations

import pydantic


class Estimate(pydantic.BaseModel):
    """`value` with its confidence interval [low, high] (95 % unless said otherwise) from `n` samples.

    Where there is too little to say anything, `value` is None and `refused` says what is missing; with a value, only
    its interval is refused: nothing is known of its spread. Without `refused`, a value without ends is exact.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    refused: str | None = None

    @classmethod
    def refuse(cls, why: str, n: int = 0) -> Estimate:
        return cls(value=None, n=n, refused=why)

    def scaled(self, factor: float) -> Estimate:
        """Times a positive constant, as in "per device"."""
        return self._with(*(None if x is None else x * factor for x in (self.value, self.low, self.high)))

    def inverted(self) -> Estimate:
        """1 / x: the ends of the interval change places. Refused for a value that is not positive; of an interval that
        reaches zero, the interval."""
        if self.value is None:
            return self
        if self.value <= 0:
            return Estimate.refuse("it would be infinite", self.n)
        if self.low is None or self.high is None:
            return self._with(1 / self.value, None, None)
        if self.low <= 0:
            return Estimate(value=1 / self.value, n=self.n, refused="its interval would be without an end")
        return self._with(1 / self.value, 1 / self.high, 1 / self.low)

    def _with(self, value: float | None, low: float | None, high: float | None) -> Estimate:
        return self.model_copy(update={"value": value, "low": low, "high": high})
