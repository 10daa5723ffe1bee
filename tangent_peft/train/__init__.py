"""Training axes with TRL: `TangentDPOTrainer` and its configuration."""

try:
    import trl as _trl  # noqa: F401
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        'tangent_peft.train needs TRL and datasets, which are not installed: pip install "tangent-peft[train]"'
    ) from error

from tangent_peft.train.config import TangentDPOConfig as TangentDPOConfig
from tangent_peft.train.conflict import ConflictAwareDPOConfig as ConflictAwareDPOConfig
from tangent_peft.train.conflict import ConflictAwareDPOTrainer as ConflictAwareDPOTrainer
from tangent_peft.train.conflict import ConflictAwareTangentDPOConfig as ConflictAwareTangentDPOConfig
from tangent_peft.train.conflict import ConflictAwareTangentDPOTrainer as ConflictAwareTangentDPOTrainer
from tangent_peft.train.sequential import Objective as Objective
from tangent_peft.train.sequential import SequentialSetup as SequentialSetup
from tangent_peft.train.sequential import run_orders as run_orders
from tangent_peft.train.sequential import run_stages as run_stages
from tangent_peft.train.trainer import TangentDPOTrainer as TangentDPOTrainer
