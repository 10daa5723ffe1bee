"""Why a mix does what it does: how linear the model still is."""

from tangent_peft.tuner.linearity import LinearityGap as LinearityGap
from tangent_peft.tuner.linearity import linearity_gap as linearity_gap
