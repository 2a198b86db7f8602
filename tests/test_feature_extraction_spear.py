# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""SpearFeatureExtractor against torchaudio and the golden features, and every kind of input it takes or refuses."""

import ast
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoFeatureExtractor

import spear_hf.feature_extraction_spear as module
from spear_hf import SpearFeatureExtractor
from spear_hf.data.audio import resample


TOLERANCE = 2e-4  # in log-mel
SECONDS = torch.arange(48000) / 16000


def torchaudio_features(waveform: torch.Tensor) -> torch.Tensor:
    from torchaudio.compliance.kaldi import fbank

    settings = {"num_mel_bins": 128, "low_freq": 20, "high_freq": -400, "dither": 0, "snip_edges": False}
    return fbank(waveform[None], sample_frequency=16000, **settings)


def random_waveforms(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


@pytest.fixture(scope="module")
def extractor():
    return SpearFeatureExtractor()


def features(extractor, raw_speech, **kwargs):
    return extractor(raw_speech, sampling_rate=16000, return_tensors="pt", **kwargs).input_features


def test_golden_features(extractor, golden):
    waveforms = [golden[f"{i}.waveform"] for i in range(5)]
    batch = extractor(waveforms, sampling_rate=16000, return_tensors="pt")
    worst = 0.0
    for i in range(5):
        expected = golden[f"{i}.input_features"]
        assert int(batch.attention_mask[i].sum()) == len(expected) == extractor.num_frames(len(waveforms[i]))
        worst = max(worst, float((batch.input_features[i, : len(expected)] - expected).abs().max()))
        padding = batch.input_features[i, len(expected) :]
        assert torch.equal(padding, torch.full_like(padding, math.log(1e-10)))
    print(f"largest deviation from the golden log-mel features: {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize(
    "waveform",
    [
        pytest.param(torch.sin(2 * math.pi * 1000 * SECONDS), id="tone"),
        pytest.param(torch.sin(2 * math.pi * (50 + 1000 * SECONDS) * SECONDS), id="chirp"),
        pytest.param(0.3 * torch.randn(48000, generator=torch.Generator().manual_seed(1)), id="noise"),
        pytest.param(1e-5 * torch.randn(48000, generator=torch.Generator().manual_seed(2)), id="near silence"),
        pytest.param(torch.zeros(48000), id="silence"),
        pytest.param(torch.full((48000,), 0.5), id="constant"),
        pytest.param((torch.arange(48000) % 4000 == 0).float(), id="clicks"),
    ],
)
def test_equals_torchaudio(extractor, waveform):
    deviation = (features(extractor, waveform)[0] - torchaudio_features(waveform)).abs().max()
    assert deviation <= TOLERANCE


def test_equals_torchaudio_wherever_the_audio_ends(extractor):
    """Places of the right edge within a hop, the ends of the hop among them, in one batch."""
    waveforms = random_waveforms(*range(1360, 1360 + 160, 9), 1519, 1520, 1521)
    batch = extractor(waveforms, sampling_rate=16000, return_tensors="pt")
    for waveform, row, mask in zip(waveforms, batch.input_features, batch.attention_mask):
        expected = torchaudio_features(waveform)
        assert int(mask.sum()) == len(expected)
        assert (row[: len(expected)] - expected).abs().max() <= TOLERANCE


def test_features_do_not_depend_on_the_batch(extractor):
    waveforms = random_waveforms(1360, 16000, 33333, 1999, 52000, 7777)
    batch = extractor(waveforms, sampling_rate=16000, padding=False).input_features
    for waveform, row in zip(waveforms, batch):
        np.testing.assert_allclose(row, extractor(waveform, sampling_rate=16000).input_features[0], rtol=0, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="a fork of a process with threads is refused elsewhere")
def test_forked_processes_do_not_wait_for_threads(extractor):
    """As `datasets.Dataset.map(num_proc=2)` makes them: OpenMP's threads stay behind in the parent."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        slow = np.sin(np.arange(80000.0)).astype(np.float32)
        waveform = resample(slow, 8000, 16000)
        expected = features(extractor, waveform)
        child = context.Process(target=lambda: theirs.send(features(extractor, resample(slow, 8000, 16000)).numpy()))
        child.start()
        found = ours.recv() if ours.poll(60) else None
        child.kill()
        child.join()
        assert found is not None
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_slabs_do_not_show(extractor, monkeypatch):
    waveforms = random_waveforms(20000, 5000)
    whole = features(extractor, waveforms)
    monkeypatch.setattr(module, "_SLAB_FRAMES_CPU", 64)
    torch.testing.assert_close(features(extractor, waveforms), whole, rtol=0, atol=1e-5)


def test_precision_settings_of_the_caller_do_not_reach_the_features(extractor):
    (waveform,) = random_waveforms(16000)
    expected = features(extractor, waveform)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(features(extractor, waveform), expected, rtol=0, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = features(extractor, waveform)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_defaults_of_the_caller_do_not_reach_the_features(extractor):
    (waveform,) = random_waveforms(16000)
    expected = features(extractor, waveform)
    try:
        torch.set_default_dtype(torch.float64)
        module._tables.cache_clear()
        with torch.device("meta"):
            found = features(extractor, waveform)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_cuda(extractor, golden):
    waveforms = [golden[f"{i}.waveform"] for i in range(5)]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        batch = extractor(waveforms, sampling_rate=16000, return_tensors="pt", device="cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert batch.input_features.device.type == batch.attention_mask.device.type == "cuda"
    for i in range(5):
        expected = golden[f"{i}.input_features"]
        found = batch.input_features[i, : len(expected)].cpu()
        # Errors of another Fourier transform go with the amplitude of the frame's loudest bin.
        loudest = expected.amax(dim=1, keepdim=True)
        assert ((found - expected).abs() < TOLERANCE + 1e-6 * ((loudest - expected) / 2).exp()).all()


class CopiesToTheHost(TorchDispatchMode):
    """Counts the values that operations bring from an accelerator to the CPU."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        stays = isinstance(output, torch.Tensor) and output.device.type != "cpu"
        if not stays and any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args):
            self.values += output.numel() if isinstance(output, torch.Tensor) else 1
        return output


@pytest.mark.gpu
def test_cuda_tensors_stay_on_the_device(extractor):
    """But for one peak an utterance, which is checked."""
    waveforms = [waveform.cuda() for waveform in random_waveforms(16000, 48000, 2000)]
    extractor(waveforms, sampling_rate=16000, return_tensors="pt")
    with CopiesToTheHost() as copies:
        batch = extractor(waveforms, sampling_rate=16000, return_tensors="pt")
    assert batch.input_features.is_cuda
    assert batch.attention_mask.is_cuda
    assert copies.values <= len(waveforms)


class TestInputs:
    @pytest.mark.parametrize(
        "convert",
        [
            pytest.param(lambda x: x, id="tensor"),
            pytest.param(lambda x: x.double(), id="float64 tensor"),
            pytest.param(lambda x: x.clone().requires_grad_(), id="tensor with gradient"),
            pytest.param(lambda x: x[None], id="(1, samples) tensor"),
            pytest.param(lambda x: x.numpy()[:, None], id="(samples, 1) array"),
            pytest.param(lambda x: x.numpy(), id="array"),
            pytest.param(lambda x: x.double().numpy(), id="float64 array"),
            pytest.param(lambda x: x.numpy().astype(">f4"), id="big-endian array"),
            pytest.param(lambda x: x.numpy()[::-1].copy()[::-1], id="array with a negative stride"),
            pytest.param(lambda x: np.frombuffer(x.numpy().tobytes(), np.float32), id="read-only array"),
            pytest.param(lambda x: x.tolist(), id="list"),
            pytest.param(lambda x: tuple(x.tolist()), id="tuple"),
            pytest.param(lambda x: [x], id="list of a tensor"),
            pytest.param(lambda x: [x.numpy()], id="list of an array"),
            pytest.param(lambda x: [x.tolist()], id="nested list"),
        ],
    )
    def test_one_utterance(self, extractor, convert):
        (waveform,) = random_waveforms(5000)
        found = features(extractor, convert(waveform))
        assert found.shape == (1, 31, 128)
        assert torch.equal(found, features(extractor, waveform))

    @pytest.mark.parametrize(
        "convert",
        [
            pytest.param(torch.stack, id="tensor"),
            pytest.param(lambda rows: np.stack([row.numpy() for row in rows]), id="array"),
            pytest.param(lambda rows: [row.tolist() for row in rows], id="nested list"),
            pytest.param(lambda rows: [rows[0], rows[1].numpy(), rows[2].tolist()], id="mixed list"),
            pytest.param(lambda rows: np.array([*(r.numpy() for r in rows), None], dtype=object)[:3], id="objects"),
        ],
    )
    def test_batch(self, extractor, convert):
        rows = random_waveforms(5000, 5000, 5000)
        assert torch.equal(features(extractor, convert(rows)), features(extractor, rows))

    def test_integers_are_scaled(self, extractor):
        (waveform,) = random_waveforms(5000)
        short = (waveform * 32768).round().clamp(-32768, 32767).to(torch.int16)
        expected = features(extractor, short.float() / 32768)
        assert torch.equal(features(extractor, short), expected)
        assert torch.equal(features(extractor, short.numpy()), expected)
        assert torch.equal(features(extractor, [short.to(torch.int32) * 65536]), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_samples(self, extractor, dtype):
        (waveform,) = random_waveforms(5000)
        waveform = waveform.to(dtype)
        assert torch.equal(features(extractor, waveform), features(extractor, waveform.float()))
        if dtype == torch.float16:
            assert torch.equal(features(extractor, waveform.numpy()), features(extractor, waveform.float()))

    def test_two_rows_are_a_batch_only_as_a_list(self, extractor):
        rows = torch.stack(random_waveforms(5000, 5000))
        assert features(extractor, list(rows)).shape == (2, 31, 128)
        with pytest.raises(ValueError, match=r"shape \(2, 5000\).*list\(raw_speech\)"):
            features(extractor, rows)

    def test_the_batch_is_left_as_it_was(self, extractor):
        waveform = np.ones(5000, np.int16)
        extractor(waveform, sampling_rate=16000)
        assert (waveform == 1).all()


GOOD = np.zeros(2000, np.float32)


class TestRefusals:
    @pytest.mark.parametrize(
        ("raw_speech", "message"),
        [
            pytest.param(np.zeros((2, 16000)), r"shape \(2, 16000\).*stereo", id="(channels, samples)"),
            pytest.param(torch.zeros(2, 16000), r"shape \(2, 16000\).*stereo", id="(channels, samples) tensor"),
            pytest.param(np.zeros((16000, 2)), r"shape \(16000, 2\).*stereo", id="(samples, channels)"),
            pytest.param(np.zeros((16000, 6)), r"shape \(16000, 6\).*stereo", id="(samples, six channels)"),
            pytest.param(np.zeros((4, 2, 16000)), r"shape \(4, 2, 16000\)", id="(batch, channels, samples)"),
            pytest.param([GOOD, np.zeros((2, 2000))], r"utterance 1 .*\(2, 2000\).*mono", id="stereo in a list"),
            pytest.param(
                [GOOD, torch.zeros(2000, 2)], r"utterance 1 .*\(2000, 2\).*mono", id="stereo tensor in a list"
            ),
            pytest.param([GOOD, GOOD, []], "utterance 2 .*empty", id="empty"),
            pytest.param(np.zeros(0), "utterance 0 .*empty", id="empty alone"),
            pytest.param([], "empty batch", id="empty batch"),
            pytest.param([GOOD, np.zeros(1359)], "utterance 1 .*too short: 1359 .*1360.*pad_short", id="too short"),
            pytest.param([GOOD, np.full(2000, np.nan)], "utterance 1 .*not finite: sample 0 is nan", id="nan"),
            pytest.param(np.append(GOOD, np.inf), "utterance 0 .*not finite: sample 2000 is inf", id="inf"),
            pytest.param([GOOD, np.append(GOOD, -np.inf)], "utterance 1 .*sample 2000 is -inf", id="-inf"),
            pytest.param([GOOD, np.full(2000, 1e300)], "utterance 1 .*not finite", id="over float32"),
            pytest.param([GOOD, np.zeros(2000, np.int64)], "utterance 1 .*int64.*int16", id="int64"),
            pytest.param(np.zeros(2000, np.uint8), "utterance 0 .*uint8", id="uint8"),
            pytest.param([0] * 2000, "utterance 0 .*int64", id="list of whole numbers"),
            pytest.param(torch.zeros(2000, dtype=torch.bool), "utterance 0 .*bool", id="bool tensor"),
            pytest.param(np.zeros(2000, np.complex64), "utterance 0 .*complex64", id="complex"),
            pytest.param([GOOD, "b.wav"], "utterance 1 .*pass floats", id="a path in a list"),
            pytest.param([GOOD, [[0.0] * 2000, [0.0]]], "utterance 1 .*not one sequence", id="ragged"),
            pytest.param("a.wav", "raw_speech is a str: pass decoded samples", id="a path"),
            pytest.param({"array": GOOD}, r'raw_speech is a dict.*audio\["array"\], with', id="a dictionary"),
            pytest.param([GOOD, {"array": GOOD}], r'utterance 1 .*is a dict.*audio\["array"\]', id="dictionaries"),
            pytest.param(
                [SimpleNamespace(get_all_samples=None)], r'utterance 0 .*audio\["array"\]', id="a decoder in a list"
            ),
        ],
    )
    def test_bad_input(self, extractor, raw_speech, message):
        with pytest.raises(ValueError, match=message):
            extractor(raw_speech, sampling_rate=16000)

    def test_wrong_rate(self, extractor):
        with pytest.raises(ValueError, match=r"sampling_rate=8000.*16000 Hz.*resample"):
            extractor(GOOD, sampling_rate=8000)

    def test_missing_rate_warns(self, extractor, caplog):
        extractor(GOOD, sampling_rate=16000)
        assert not caplog.messages
        extractor(GOOD)
        assert "Pass sampling_rate=16000" in caplog.text

    def test_integers_held_as_floats_warn(self, extractor, caplog):
        extractor([GOOD, 3000 * np.sin(np.arange(5000.0))], sampling_rate=16000)
        assert "Utterance 1" in caplog.text
        assert "divide them by 32768" in caplog.text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"truncation": True}, "max_length"),
            ({"padding": "max_length"}, "max_length"),
            ({"padding": "max_length", "max_length": 0}, "max_length=0"),
            ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
            ({"padding": "widest"}, "widest"),
            ({"return_tensors": "tf"}, "tf"),
        ],
    )
    def test_bad_arguments(self, extractor, arguments, message):
        with pytest.raises(ValueError, match=message):
            extractor(GOOD, sampling_rate=16000, **arguments)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"padding_side": "left"}, "padding_side='left'"),
            ({"hop_length": 0}, "hop_length=0"),
            ({"feature_size": 0}, "feature_size=0"),
            ({"feature_size": "128"}, "feature_size='128'"),
            ({"mel_floor": 0.0}, "mel_floor=0.0"),
            ({"n_fft": 256}, "n_fft=256"),
            ({"max_frequency": 9000.0}, "max_frequency=9000"),
            ({"hop_length": 16}, "win_length=400 is over 136"),
        ],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            SpearFeatureExtractor(**settings)


class TestPadding:
    @pytest.mark.parametrize("multiple", [None, 16])
    @pytest.mark.parametrize(
        ("padding", "max_length", "truncation"),
        [
            (True, None, False),
            ("longest", 20, True),
            ("longest", 20, False),
            ("max_length", 20, True),
            ("max_length", 20, False),
            ("max_length", 200, True),
            ("max_length", 200, False),
            (False, None, False),
            (False, 20, True),
            ("do_not_pad", 200, True),
        ],
    )
    def test_equals_the_method_pad(self, extractor, padding, max_length, truncation, multiple):
        waveforms = random_waveforms(16000, 1360, 5000)
        arguments = {
            "padding": padding,
            "max_length": max_length,
            "truncation": truncation,
            "pad_to_multiple_of": multiple,
        }
        found = extractor(waveforms, sampling_rate=16000, **arguments)
        if padding in (False, "do_not_pad"):  # `pad` would stack, which lengths that differ do not allow
            lengths = [100, 9, 31]
            if truncation:
                lengths = [min(length, -(-max_length // (multiple or 1)) * (multiple or 1)) for length in lengths]
            assert [len(row) for row in found.input_features] == lengths
            assert [row.tolist() for row in found.attention_mask] == [[1] * length for length in lengths]
            return
        unpadded = extractor(waveforms, sampling_rate=16000, padding=False)
        expected = extractor.pad(unpadded, **arguments)
        for key in ("input_features", "attention_mask"):
            for row, other in zip(found[key], expected[key], strict=True):
                np.testing.assert_array_equal(row, other)
                assert row.dtype == other.dtype

    def test_kinds_of_output(self, extractor):
        waveforms = random_waveforms(16000, 5000)
        tensors = extractor(waveforms, sampling_rate=16000, return_tensors="pt")
        assert list(tensors) == ["input_features", "attention_mask"]
        assert tensors.input_features.shape == (2, 100, 128)
        assert tensors.input_features.dtype == torch.float32
        assert tensors.attention_mask.dtype == torch.int32
        arrays = extractor(waveforms, sampling_rate=16000, return_tensors="np")
        np.testing.assert_array_equal(arrays.input_features, tensors.input_features.numpy())
        np.testing.assert_array_equal(arrays.attention_mask, tensors.attention_mask.numpy())
        rows = extractor(waveforms, sampling_rate=16000)
        assert isinstance(rows.input_features, list)
        np.testing.assert_array_equal(rows.input_features[1], arrays.input_features[1])

    def test_unpadded_tensors_of_unlike_length_are_refused(self, extractor):
        with pytest.raises(ValueError, match="padding=True"):
            extractor(random_waveforms(16000, 5000), sampling_rate=16000, padding=False, return_tensors="pt")

    def test_without_attention_mask(self, extractor):
        assert list(extractor(GOOD, sampling_rate=16000, return_attention_mask=False)) == ["input_features"]
        assert list(SpearFeatureExtractor(return_attention_mask=False)(GOOD, sampling_rate=16000)) == [
            "input_features"
        ]

    def test_pad_short(self, extractor):
        (waveform,) = random_waveforms(700)
        expected = features(extractor, torch.nn.functional.pad(waveform, (0, 660)))
        assert expected.shape == (1, 9, 128)
        assert torch.equal(features(extractor, waveform, pad_short=True), expected)
        padding_one = SpearFeatureExtractor(pad_short=True)
        assert torch.equal(features(padding_one, waveform), expected)
        with pytest.raises(ValueError, match="too short: 700"):
            features(padding_one, waveform, pad_short=False)
        with pytest.raises(ValueError, match="empty"):
            features(padding_one, np.zeros(0))


def test_save_and_load(tmp_path):
    first = SpearFeatureExtractor(pad_short=True)
    first(GOOD, sampling_rate=16000)  # nothing it computes is saved
    first.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["feature_extractor_type"] == "SpearFeatureExtractor"
    assert all(isinstance(value, (str, int, float, bool)) for value in written.values())
    for second in (SpearFeatureExtractor.from_pretrained(tmp_path), AutoFeatureExtractor.from_pretrained(tmp_path)):
        assert type(second) is SpearFeatureExtractor
        assert second.to_dict() == first.to_dict()


def test_file_stands_alone():
    """It is copied to the Hub as remote code, where only torch, numpy and transformers can be counted on."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    standard = {"collections", "contextlib", "functools", "math", "os", "typing"}
    assert imported <= standard | {"numpy", "torch", "transformers"}


@pytest.mark.slow
def test_faster_than_torchaudio_one_by_one(extractor):
    waveforms = random_waveforms(*[160000] * 32)
    ours, theirs = [], []
    for _ in range(15):  # taking turns, so that other work on the machine hits both
        start = time.perf_counter()
        extractor(waveforms, sampling_rate=16000, return_tensors="pt")
        middle = time.perf_counter()
        rows = [torchaudio_features(waveform) for waveform in waveforms]
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=math.log(1e-10))
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    ratio = min(theirs) / min(ours)
    print(f"32 x 10 s: {min(ours) * 1000:.0f} ms, torchaudio {min(theirs) * 1000:.0f} ms: {ratio:.2f} times as fast")
    assert ratio >= 1.5
