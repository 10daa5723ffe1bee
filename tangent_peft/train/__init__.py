"""Training axes with TRL: `TangentDPOTrainer` and its configuration."""

try:
    import trl as _trl  # noqa: F401
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        'tangent_peft.train needs TRL and datasets, which are not installed: pip install "tangent-peft[train]"'
    ) from error

from tangent_peft.train.config import TangentDPOConfig as TangentDPOConfig
from tangent_peft.train.trainer import TangentDPOTrainer as TangentDPOTrainer
