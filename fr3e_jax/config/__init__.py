"""The configuration of a run: its options, what each takes, what cannot stand together, and its files."""

from fr3e_jax.config.alarms import AlarmsConfig
from fr3e_jax.config.checks import check_options
from fr3e_jax.config.consistency import check, resolve, rows_of_state, rule_needs, updates_of, without_effect
from fr3e_jax.config.files import find_config
from fr3e_jax.config.report import ReportConfig
from fr3e_jax.config.sections import (
    PACKAGE,
    QUICKSTART_MODEL,
    BadRows,
    CheckpointConfig,
    Config,
    DataConfig,
    DevicesConfig,
    DistributedConfig,
    EndConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    RecordConfig,
    RewardConfig,
    ScoringConfig,
    SourceConfig,
)
from fr3e_jax.config.sft import SFTConfig
from fr3e_jax.config.stages import CreditConfig, ExploreConfig, LossConfig, OptimizerConfig, RolloutConfig
from fr3e_jax.config.values import ConfigError, OptionError, tables_of, with_functions
from fr3e_jax.config.written import as_written, dump

__all__ = [
    "PACKAGE",
    "QUICKSTART_MODEL",
    "AlarmsConfig",
    "BadRows",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "CreditConfig",
    "DataConfig",
    "DevicesConfig",
    "DistributedConfig",
    "EndConfig",
    "EvaluateConfig",
    "ExploreConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OptionError",
    "RecordConfig",
    "ReportConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "ScoringConfig",
    "SourceConfig",
    "as_written",
    "check",
    "check_options",
    "dump",
    "find_config",
    "resolve",
    "rows_of_state",
    "rule_needs",
    "tables_of",
    "updates_of",
    "with_functions",
    "without_effect",
]
