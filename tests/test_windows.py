# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Long audio in windows: what it differs by from the whole, where the windows meet, and how memory grows."""

import numpy as np
import pytest
import soundfile
import torch

from spear_hf import SpearFeatureExtractor, SpearModel
from spear_hf.evaluation.embedding import embed_files
from spear_hf.evaluation.windows import encode_in_windows

from .long_audio import run_and_measure


@pytest.fixture(scope="module")
def features(golden):
    """All utterances of the golden file, one after the other: about 11 s at 100 Hz, of an odd number of frames."""
    return torch.cat([golden[f"{i}.input_features"] for i in range(5)] * 3)[None, :1107]


@pytest.fixture(params=["tiny", "tiny_ds2"])
def encoder(request, golden_folder, golden_ds2_folder):
    return SpearModel.from_pretrained(golden_folder if request.param == "tiny" else golden_ds2_folder).eval()


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def test_one_window_is_the_whole(encoder, features):
    whole = encoder(features, output_hidden_states=True)
    one = encode_in_windows(encoder, features, window_seconds=60, output_hidden_states=True)
    assert torch.equal(one.last_hidden_state, whole.last_hidden_state)
    assert all(map(torch.equal, one.hidden_states, whole.hidden_states))
    assert encode_in_windows(encoder, features, window_seconds=60).hidden_states is None


@torch.no_grad()
@pytest.mark.parametrize("length", [1107, 810])
def test_deviation(encoder, features, length, capsys):
    """Of windows of 3 s: all that misses is what attention sees beyond the context."""
    features = features[:, :length]
    whole = encoder(features, output_hidden_states=True)
    errors = {}
    for context in (0.0, 1.0, 2.0):
        parts = encode_in_windows(encoder, features, 3.0, context, output_hidden_states=True)
        assert len(parts.hidden_states) == len(whole.hidden_states)
        states = zip(parts.hidden_states, whole.hidden_states)
        errors[context] = [relative_error(part, state) for part, state in states]
        errors[context].append(relative_error(parts.last_hidden_state, whole.last_hidden_state))
    with capsys.disabled():
        print(f"\ndeviation of the last hidden state by context: { {c: f'{e[-1]:.1e}' for c, e in errors.items()} }")
    assert max(errors[2.0]) < max(errors[0.0])
    assert errors[1.0][0] < 1e-6  # the stem sees three frames
    assert errors[2.0][-1] < 0.05


@torch.no_grad()
def test_without_attention_windows_are_exact(encoder, features):
    """Convolutions, downsampling and the filling of the last group see the same: frames are in their places."""
    for module in encoder.modules():
        if type(module).__name__ in ("SpearSelfAttention", "SpearNonlinAttention"):
            module.out_proj.weight.zero_()
    whole = encoder(features, output_hidden_states=True)
    parts = encode_in_windows(encoder, features, 2.0, 4.0, output_hidden_states=True)
    for part, state in zip([*parts.hidden_states, parts.last_hidden_state], [*whole.hidden_states, whole[0]]):
        assert torch.allclose(part, state, rtol=1e-5, atol=1e-5)


def test_what_is_refused(encoder, features):
    with pytest.raises(ValueError, match=r"window_seconds=0\.1"):
        encode_in_windows(encoder, features, 0.1)
    with pytest.raises(ValueError, match="context_seconds=-1"):
        encode_in_windows(encoder, features, 3.0, -1)
    with pytest.raises(ValueError, match="2 utterances"):
        encode_in_windows(encoder, features.expand(2, -1, -1), 3.0)
    with pytest.raises(ValueError, match="at least 9"):
        encode_in_windows(encoder, features[:, :8], 3.0)


def test_embedding_in_windows(encoder, tmp_path):
    """Only files longer than a window; each has as many frames as before."""
    rng = np.random.default_rng(0)
    for name, seconds in (("long", 7.1), ("short", 2.0)):
        soundfile.write(tmp_path / f"{name}.wav", rng.normal(0, 0.1, round(seconds * 16000)), 16000)
    extractor = SpearFeatureExtractor()
    for layer in ("last", "all", 2):
        settings = {"layer": layer, "batch_seconds": 3.0}
        whole = {file.id: file for file in embed_files([tmp_path], encoder, extractor, **settings)}
        parts = {file.id: file for file in embed_files([tmp_path], encoder, extractor, window_seconds=3.0, **settings)}
        assert parts.keys() == whole.keys() == {"long.wav", "short.wav"}
        assert np.array_equal(parts["short.wav"].embedding, whole["short.wav"].embedding)
        assert parts["long.wav"].embedding.shape == whole["long.wav"].embedding.shape
        assert parts["long.wav"].frame_rate == whole["long.wav"].frame_rate
    with pytest.raises(ValueError, match="window_seconds=2"):
        embed_files([tmp_path], encoder, extractor, batch_seconds=3.0, window_seconds=2.0)


MINUTES = """
import torch
from spear_hf import SpearConfig, SpearModel
from spear_hf.evaluation.windows import encode_in_windows
torch.set_num_threads(1)
sizes = {"num_attention_heads": 4, "stem_channels": [4, 4, 8], "conv_kernel_sizes": [7]}
config = SpearConfig(hidden_size=64, intermediate_size=64, num_layers_per_stack=[1], downsampling_factors=[4], **sizes)
model = SpearModel(config).eval()
features = torch.randn(1, int(sys.argv[1]) * 6000, 128)
with torch.no_grad():
    encode_in_windows(model, features[:, :6000], 20.0)
    begin()
    print(encode_in_windows(model, features, 20.0).last_hidden_state.numel() * 4 / 2**20)
"""


def test_memory_is_that_of_a_window_and_of_the_result():
    (result,), growth = run_and_measure(MINUTES, 10)
    assert growth < float(result) + 25  # MB; the features alone are 30
