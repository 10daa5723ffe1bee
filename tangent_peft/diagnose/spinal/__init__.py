"""SPINAL (arXiv 2601.06238): contraction, transport and gradients by depth."""

from tangent_peft.diagnose.spinal.options import SpinalOptions as SpinalOptions
from tangent_peft.diagnose.spinal.power_law import FitRule as FitRule
from tangent_peft.diagnose.spinal.power_law import PowerLaw as PowerLaw
from tangent_peft.diagnose.spinal.power_law import fit_power_law as fit_power_law
from tangent_peft.diagnose.spinal.power_law import noise_exponent as noise_exponent
from tangent_peft.diagnose.spinal.score import SpinalScore as SpinalScore
from tangent_peft.diagnose.spinal.score import spinal_score as spinal_score
from tangent_peft.diagnose.spinal.trace import SpinalTrace as SpinalTrace
from tangent_peft.diagnose.spinal.trace import spinal_trace as spinal_trace
