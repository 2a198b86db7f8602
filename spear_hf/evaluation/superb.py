# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""SPEAR as an upstream of s3prl, the toolkit of SUPERB (arXiv 2105.01051). s3prl itself is not needed to import this.

By torch.hub, from the folder of this module:

    upstream = torch.hub.load("spear_hf/evaluation/superb_hub", "spear", ckpt="MODEL", source="local")

Among the names of `s3prl.hub`, for `s3prl.nn.S3PRLUpstream` and for a script around `s3prl.run_downstream`:

    import s3prl.hub
    from spear_hf.evaluation.superb_hub.hubconf import spear
    s3prl.hub.spear = spear                     # run_downstream -u spear -k MODEL ...

For the command line of a checkout of s3prl, put `from spear_hf.evaluation.superb_hub.hubconf import *` into its
s3prl/hub.py. MODEL is a folder or a Hub id.

s3prl 0.4.18 needs torchaudio < 2.9, and its run_downstream two names, HfFolder and Repository, that huggingface_hub 1
no longer has: set both to None in that module first. tests/test_s3prl.py runs where s3prl is installed.

Hidden states are the stem's output and that of every layer, all at 50 Hz, of which the toolkit learns a weighted sum.
Audio of n samples gets n / 320 frames, rounded up: all that s3prl.nn.S3PRLUpstream takes for frames of it, and at most
one more than the Featurizer of run_downstream cuts to (which allows a difference of 4). Frame t lies in the middle of
the samples from 320 t to 320 t + 320. For that audio is extended by its mirror image, framing.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.audio import SAMPLING_RATE
from ..feature_extraction_spear import SpearFeatureExtractor
from ..modeling_spear import SpearPreTrainedModel
from .embedding import load_encoder
from .framing import FRAME_SAMPLES, framed


class UpstreamExpert(nn.Module):
    """s3prl's interface: waveforms in, `hidden_states` out. Trainable, if the toolkit wants it to be.

    Args:
        ckpt: folder or Hub id of a SPEAR model.
        model_config: s3prl passes it; a model has its configuration with it, so that only None is taken.

    Raises:
        ValueError: no model named, one that is not SPEAR, or a model_config.
    """

    def __init__(self, ckpt: str | None = None, model_config: str | None = None, **kwargs: Any) -> None:
        super().__init__()
        if not ckpt:
            raise ValueError("ckpt is not set: name the folder or Hub id of a SPEAR model (-k of run_downstream)")
        if model_config is not None:
            raise ValueError(f"model_config={model_config!r}: the configuration is that of {ckpt}, leave it out")
        model, feature_extractor = load_encoder(ckpt, device="cpu")
        encoder: Any = model.base_model
        if not isinstance(encoder, SpearPreTrainedModel) or not isinstance(feature_extractor, SpearFeatureExtractor):
            raise ValueError(f"{ckpt} is a {encoder.config.model_type} model: this upstream is for SPEAR models")
        self.model = encoder
        self.feature_extractor = feature_extractor

    def get_downsample_rates(self, key: str | None = None) -> int:
        """Samples from one frame to the next, the same for every feature."""
        return FRAME_SAMPLES

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """Waveforms (samples,) at 16 kHz in [-1, 1] of any lengths, on the device of the model.

        Returns:
            `hidden_states`: list of num_hidden_layers + 1 tensors (batch, frames of the longest, dim), zero behind the
            frames of a shorter one; `hidden_state_K`: each of them; `last_hidden_state`: the last one.

        Raises:
            ValueError: a waveform that is no tensor (samples,), or has none of them.
        """
        for wav in wavs:
            if not isinstance(wav, Tensor) or wav.ndim != 1:
                shape = tuple(getattr(wav, "shape", ()))
                raise ValueError(f"a waveform is {type(wav).__name__} {shape}: tensors (samples,) are needed")
        device = next(self.model.parameters()).device
        frames = [-(-len(wav) // FRAME_SAMPLES) for wav in wavs]
        extended = [framed(wav.float(), count, FRAME_SAMPLES // 2) for wav, count in zip(wavs, frames)]
        inputs = self.feature_extractor(extended, sampling_rate=SAMPLING_RATE, return_tensors="pt", device=device)
        states = self.model(**inputs, output_hidden_states=True).hidden_states
        counts = torch.tensor(frames, device=device)
        padding = torch.arange(states[0].shape[1], device=device) >= counts[:, None]  # (batch, frames)
        states = [state.masked_fill(padding[:, :, None], 0.0) for state in states]
        named = {f"hidden_state_{index}": state for index, state in enumerate(states)}
        return {"hidden_states": states, "last_hidden_state": states[-1], **named}
