"""Axes as what they do to hidden states: CCA, CKA and cosines of their shifts, beside a null and controls."""

from tangent_peft.diagnose.interference.measure import axis_interference as axis_interference
from tangent_peft.diagnose.interference.overlap import Overlap as Overlap
from tangent_peft.diagnose.interference.overlap import shift_overlap as shift_overlap
from tangent_peft.diagnose.interference.result import Interference as Interference
from tangent_peft.diagnose.interference.result import InterferenceSettings as InterferenceSettings
