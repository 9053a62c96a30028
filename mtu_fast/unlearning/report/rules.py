"""Thresholds of the verdict, which are our choice, and its rules in words."""

from __future__ import annotations

# share of the way from the original's forget score to the reference from which data count as
# removed
WAY = 0.9
PART = 0.5  # from which they count as partly removed
SLACK = 0.02  # a score may fall by so much and count as kept; differences below it show nothing
# scores in this range are means over samples; p has a standard error of at most √(p (1 - p) / n)
SHARE = (0.0, 1.0)
HARM = 0.1  # a fall by more is serious
# standard errors of an AUC of 0.5 that chance may explain; several attacks are looked at
CHANCE = 2.5
# an AUC as far as this from 0.5 should show; where chance explains it, there are too few samples
WIDE = 0.15
NEAR = 0.1  # an AUC further than this from 0.5 does not look like a guess
CLEAR = 0.25  # an AUC further than this from 0.5 is a poor result

RULES = (
    "The reference for a forget score is the retrained model's, or the original's test score where there is none; for "
    "a removed class chance where there is none, below which nothing is over-forgotten.",
    f"Removed: the forget score fell at least {WAY:.0%} of the way to the reference; partly: at least {PART:.0%}; a "
    f"way of less than {SLACK} shows nothing by itself. A score within the reference's standard error √(p (1 − p) / n) "
    f"has arrived (or within {SLACK}, if that is more); one further below is over-forgotten.",
    f"Kept: no score on retained or unseen data, and no other task of the forget data, fell by more than {SLACK}; "
    f"more than {HARM} is serious. With a retrained model a fall counts only as far as retraining does not share it; "
    "without one a target's test score may fall by the share of a removed class in the test data.",
    f"Told apart: the attack's AUC is more than {CHANCE:g} standard errors away from 0.5, on either side, and at least "
    "one further away than the retrained model's, if there is one. A removed class is judged beside one only.",
    f"Too few samples to tell: the attack does not tell them apart, but {CHANCE:g} standard errors are {WIDE} or more, "
    f"so that chance could give {0.5 + WIDE}, or its AUC is further than {NEAR} from 0.5 and still within them.",
    f"Single retained samples are mentioned where the worst 1 % of a task's losses rose by more than {SLACK} beyond "
    "any rise of the mean.",
)
