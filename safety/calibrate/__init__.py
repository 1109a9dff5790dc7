"""Fit the three defenses and the trace detector for one model, from samples.

    artifacts = calibrate(lvlm, samples, held_out, out, work)

A sample is looked at once (`observe`); each defense is then fitted on what was kept (`sasa`, `revision`, `sapt`,
`trace`), and the result is tried on samples that took no part (`trial`).
"""

from safety.calibrate.material import PARTS, Recipe
from safety.calibrate.progress import Cancelled
from safety.calibrate.run import calibrate

__all__ = ["PARTS", "Cancelled", "Recipe", "calibrate"]
