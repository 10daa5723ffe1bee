"""What stages of training did to each objective (arXiv 2606.19744)."""

from tangent_peft.diagnose.stages.forgetting import Conflict as Conflict
from tangent_peft.diagnose.stages.forgetting import Forgetting as Forgetting
from tangent_peft.diagnose.stages.forgetting import forgetting as forgetting
from tangent_peft.diagnose.stages.transfer import ObjectiveScores as ObjectiveScores
