# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""SPEAR speech and audio encoders in transformers. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .configuration_spear import SpearConfig
from .modeling_spear import SpearForPreTraining, SpearModel, SpearPreTrainedModel


__version__ = "0.1.0"

AutoConfig.register("spear", SpearConfig, exist_ok=True)
AutoModel.register(SpearConfig, SpearModel, exist_ok=True)
AutoModelForPreTraining.register(SpearConfig, SpearForPreTraining, exist_ok=True)

__all__ = ["SpearConfig", "SpearForPreTraining", "SpearModel", "SpearPreTrainedModel"]
