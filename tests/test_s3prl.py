# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Our upstream inside the real s3prl: its hub, its S3PRLUpstream, its Featurizers, its metrics. Skipped without it.

s3prl 0.4.18 imports parts of torchaudio that 2.9 no longer has. In an environment of its own:

    pip install torch==2.8.0 torchaudio==2.8.0 s3prl omegaconf editdistance && pip install . pytest
    python -m pytest tests/test_s3prl.py
"""

import numpy as np
import pytest
import torch

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearModel
from spear_hf.evaluation.metrics import (
    CharacterErrorRate,
    EqualErrorRate,
    MinimumDetectionCost,
    PhoneErrorRate,
    WordErrorRate,
)
from spear_hf.evaluation.superb_hub.hubconf import spear

from .test_hear import SIZES, noise


try:
    from s3prl import hub
    from s3prl.nn import Featurizer, S3PRLUpstream
    from s3prl.upstream.interfaces import Featurizer as RunnerFeaturizer
except (ImportError, AttributeError) as error:  # it is not there, or this torchaudio is too new for it
    pytest.skip(f"s3prl cannot be imported: {error}", allow_module_level=True)


SHORTEST, LONGEST = 1600, 35 * 16000  # 0.1 s, 35 s
LENGTHS = sorted({*range(SHORTEST, SHORTEST + 961, 11), *range(SHORTEST, LONGEST, 2 * 16000 + 17), 16000, LONGEST})


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    SpearModel(SpearConfig(**SIZES)).save_pretrained(folder)
    SpearFeatureExtractor().save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "spear", spear, raising=False)  # as superb.py says
        assert "spear" in hub.options()
        return S3PRLUpstream("spear", path_or_url=str(folder)).eval()


@torch.no_grad()
def test_every_length_passes_the_toolkit(upstream):
    assert (upstream.num_layers, set(upstream.hidden_sizes), set(upstream.downsample_rates)) == (3, {16}, {320})
    weighted, of_runner = Featurizer(upstream), RunnerFeaturizer(upstream.upstream, upstream_device="cpu")
    for samples in LENGTHS:
        wav = noise(1, samples)
        states, lengths = upstream(wav, torch.tensor([samples]))
        features, length = weighted(states, lengths)
        own = upstream.upstream([wav[0]])
        # Nothing was cut off or repeated.
        assert features.shape == (1, int(length), 16) == own["hidden_states"][0].shape
        assert torch.allclose(features, torch.stack(own["hidden_states"]).mean(dim=0), atol=1e-5)
        (kept,) = of_runner([wav[0]], own)
        assert len(kept) == round(samples / 320)


@torch.no_grad()
def test_a_batch_gives_what_each_gives_alone(upstream):
    samples = (SHORTEST, 30000, 16001)
    wavs = [noise(1, count, seed)[0] for seed, count in enumerate(samples)]
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    together, lengths = upstream(padded, torch.tensor(samples))
    for row, wav in enumerate(wavs):
        alone, length = upstream(wav[None], torch.tensor([len(wav)]))
        for one, other, count in zip(alone, together, length):
            assert int(count) == int(lengths[0][row])
            assert torch.allclose(one[0], other[row, : int(count)], atol=1e-5)


def test_fine_tuning_reaches_the_encoder(upstream):
    states, lengths = upstream(noise(2, 8000), torch.tensor([8000, 6000]))
    features, _ = Featurizer(upstream)(states, lengths)
    features.sum().backward()
    assert upstream.upstream.model.stem.conv1.weight.grad.abs().sum() > 0


def test_metrics_are_those_of_the_toolkit():
    theirs = pytest.importorskip("s3prl.metric.common")
    rng = np.random.default_rng(0)
    truth = (rng.random(300) < 0.2).astype(int)
    scores = rng.standard_normal(300) + 1.2 * truth
    trials = {"predictions": scores, "references": truth}
    assert EqualErrorRate().compute(**trials)["eer"] == pytest.approx(theirs.compute_eer(truth, scores)[0], abs=1e-6)
    for prior in (0.01, 0.05, 0.3):
        expected, _ = theirs.compute_minDCF(truth, scores, p_target=prior)
        assert MinimumDetectionCost().compute(**trials, prior=prior)["min_dcf"] == pytest.approx(expected)
    texts = [" ".join(rng.choice(["ab", "b", "cab", "d"], size=rng.integers(1, 9))) for _ in range(60)]
    pairs = {"predictions": texts[:30], "references": texts[30:]}
    for metric, name in ((WordErrorRate, "wer"), (CharacterErrorRate, "cer"), (PhoneErrorRate, "per")):
        assert metric().compute(**pairs)[name] == pytest.approx(getattr(theirs, name)(texts[:30], texts[30:]))
