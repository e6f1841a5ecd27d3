"""How fast a node is: what it believes that steps take, learned from each that ends."""

from __future__ import annotations

from engine.base import StepReport
from engine.cost import StepCost
from engine.residuals import Residuals

# Of single steps, that a margin covers. The planner's: promises last for many steps, of which some take less.
# And that of batches, where one step too long is a token too late: it costs next to nothing, decodes run ahead.
PLAN_QUANTILE = 0.95
BATCH_QUANTILE = 0.98
USUAL_WEIGHT = 0.1  # of the last step, in what steps usually take


class Speed:
    """What steps take, from a profile on.

    `cost` as it stands, and as it was on the idle machine; `usual_s` of a step, an exponential average (0.0
    before the first). Margins are shares by which a step may well take longer than predicted, as of the last
    `refresh`: for who plans, and for who composes a batch.
    """

    def __init__(self, cost: StepCost, now_s: float) -> None:
        self.cost = cost
        self.idle_cost = cost
        self.steps = 0
        self.usual_s = 0.0
        self.plan_margin = 0.0
        self.batch_margin = 0.0
        self._residuals = Residuals()
        self._learned_s = now_s

    def learn(self, report: StepReport, now_s: float) -> float:
        """Take a step into account. Returns the seconds that it would have taken by the profile alone."""
        seconds, predicted_s, drift = report.seconds, self.cost.of(report), self.cost.drift
        self.steps += 1
        self.usual_s += (USUAL_WEIGHT if self.steps > 1 else 1.0) * (seconds - self.usual_s)
        if predicted_s > 0 and seconds > 0 and report.tokens > 0:
            self._residuals.note(seconds / predicted_s)
            self.cost = self.cost.drifted(seconds / predicted_s)
        self._learned_s = now_s
        return predicted_s / drift

    def rest(self, now_s: float) -> None:
        """No step has run for a while: let go of what they taught, by the time since the last."""
        self.cost = self.cost.rested(now_s - self._learned_s)
        self._learned_s = now_s

    def refresh(self) -> None:
        """Read the margins anew from the steps that were seen."""
        self.plan_margin = self._residuals.margin(PLAN_QUANTILE)
        self.batch_margin = self._residuals.margin(BATCH_QUANTILE)
