"""Axes against other ways to mix preferences, trained and evaluated alike: same data, layers, steps and scores."""

from tangent_peft.compare.result import ComparisonResult as ComparisonResult
from tangent_peft.compare.run import run_comparison as run_comparison
from tangent_peft.compare.sequential import run_sequential as run_sequential
from tangent_peft.compare.sequential_result import SequentialResult as SequentialResult
from tangent_peft.compare.sequential_settings import SequentialSettings as SequentialSettings
from tangent_peft.compare.settings import Settings as Settings
from tangent_peft.compare.training import Training as Training
from tangent_peft.compare.training import run_training as run_training
from tangent_peft.compare.training import trainings as trainings
