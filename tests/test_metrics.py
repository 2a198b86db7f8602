# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The local metrics against cases worked out by hand, and against jiwer and scikit-learn on random ones."""

from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import evaluate
import jiwer
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from spear_hf.evaluation.metrics import (
    Accuracy,
    CharacterErrorRate,
    DPrime,
    EqualErrorRate,
    FrameScores,
    MeanAveragePrecision,
    MinimumDetectionCost,
    MultiLabelFrameScores,
    PhoneErrorRate,
    WordErrorRate,
    equal_error_rate,
    mean_average_precision,
    weighted_average_precision,
    weighted_equal_error_rate,
)


ALL = (
    Accuracy,
    CharacterErrorRate,
    DPrime,
    EqualErrorRate,
    FrameScores,
    MeanAveragePrecision,
    MinimumDetectionCost,
    MultiLabelFrameScores,
    PhoneErrorRate,
    WordErrorRate,
)


@pytest.mark.parametrize("metric", ALL)
def test_is_an_evaluate_metric(metric):
    assert isinstance(metric(), evaluate.Metric)


def test_several_processes_bring_their_trials_together(tmp_path):
    """The API of `evaluate`: each adds its own, and the first one computes. They wait for each other's files alone."""

    def score(rank):
        metric = EqualErrorRate(num_process=2, process_id=rank, experiment_id="x", cache_dir=str(tmp_path))
        metric.add_batch(predictions=[[0.9, 0.2], [0.8, 0.1]][rank], references=[1, 0])
        return metric.compute()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(score, range(2))) == [{"eer": 0.0, "eer_threshold": 0.8}, None]
    assert Accuracy("default", keep_in_memory=False, cache_dir=str(tmp_path)).compute(
        predictions=[1, 2], references=[1, 1]
    ) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "message"),
    [
        (WordErrorRate, ["a"], [" "], "no word in the 1 references"),
        (WordErrorRate, [], [], "no word in the 0 references"),
        (CharacterErrorRate, ["a", "b"], ["", ""], "no character in the 2 references"),
        (PhoneErrorRate, ["a"], [""], "no phone in the 1 references"),
        (MeanAveragePrecision, [[0.1, 0.2, 0.3]], [[1, 0]], "rows have 2 to 3 classes"),
        (MeanAveragePrecision, [[0.1, 0.2], [0.3]], [[1, 0], [1]], "rows have 1 to 2 classes"),
        (MeanAveragePrecision, [[0.1, 0.2]], [[2, 0]], "references are 0 or 1, and there is 2"),
        (DPrime, [[0.1], [0.2]], [[-1], [1]], "references are 0 or 1, and there is -1"),
        (MultiLabelFrameScores, [[0, 2]], [[0, 1]], "predictions are 0 or 1, and there is 2"),
        (MultiLabelFrameScores, [[0, 1, 1]], [[0, 1]], "rows have 2 to 3 classes"),
        (EqualErrorRate, [0.1, 0.2, 0.3], [1, 0, 2], "references of trials are 0 or 1, and there is 2"),
    ],
)
def test_what_cannot_be_scored(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric().compute(predictions=predictions, references=references)


def test_scores_are_not_rounded():
    """In single precision all three are one."""
    scores = [[1 - 1e-9], [1 - 2e-9], [1 - 3e-9]]
    assert MeanAveragePrecision().compute(predictions=scores, references=[[1], [0], [0]])["map"] == 1.0
    assert DPrime().compute(predictions=scores, references=[[1], [0], [0]])["auc"] == 1.0


def test_word_error_rate_is_of_all_words():
    # One of four words wrong and one of one: 2 / 5, where the mean of the two rates would be 0.625.
    references = ["the cat sat down", "yes"]
    result = WordErrorRate().compute(predictions=["the cat sat up", "no"], references=references)
    assert result == {"wer": pytest.approx(2 / 5)}
    # A deletion and an insertion; nothing written at all.
    assert WordErrorRate().compute(predictions=["cat sat down now"], references=references[:1])["wer"] == 2 / 4
    assert WordErrorRate().compute(predictions=[""], references=["a b"])["wer"] == 1.0


def test_character_error_rate():
    result = CharacterErrorRate().compute(predictions=["abd", "xy"], references=["abc", "xyz"])
    assert result == {"cer": pytest.approx(2 / 6)}


def test_error_rates_agree_with_jiwer():
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(list("abcd"), size=6)) for _ in range(40)]
    references, predictions = texts[:20], texts[20:]
    assert WordErrorRate().compute(predictions=predictions, references=references)["wer"] == jiwer.wer(
        references, predictions
    )
    assert CharacterErrorRate().compute(predictions=predictions, references=references)["cer"] == jiwer.cer(
        references, predictions
    )


def test_accuracy():
    assert Accuracy().compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}


def test_mean_average_precision():
    # Class 0: positives at ranks 1 and 3, (1/1 + 2/3) / 2. Class 1: no positive. Class 2: first.
    scores = [[0.9, 0.5, 0.2], [0.8, 0.5, 0.9], [0.1, 0.5, 0.3]]
    truth = [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    result = MeanAveragePrecision().compute(predictions=scores, references=truth)
    assert result == {"map": pytest.approx((5 / 6 + 1) / 2), "classes": 2}
    with pytest.raises(ValueError, match="no class has a positive among the 1"):
        MeanAveragePrecision().compute(predictions=[[0.5, 0.5]], references=[[0, 0]])


def test_mean_average_precision_agrees_with_scikit_learn():
    generator = np.random.default_rng(1)
    scores = generator.random((50, 4)).astype(np.float32)
    truth = (generator.random((50, 4)) < 0.3).astype(int)
    result = MeanAveragePrecision().compute(predictions=scores.tolist(), references=truth.tolist())
    assert result["map"] == pytest.approx(average_precision_score(truth, scores, average="macro"))


def test_frame_scores():
    # Class 0: precision 2/3, recall 1; class 1: precision 1, recall 1/2.
    result = FrameScores().compute(predictions=[0, 0, 0, 1], references=[0, 0, 1, 1])
    assert result == {"frame_accuracy": 0.75, "frame_f1": pytest.approx((0.8 + 2 / 3) / 2)}


def test_multi_label_frame_scores():
    guess, truth = [[1, 0, 0], [1, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    result = MultiLabelFrameScores().compute(predictions=guess, references=truth)
    # Class 0: one hit, one false, one missed. Class 1: right. Class 2 does not occur.
    assert result == {"frame_f1": pytest.approx((0.5 + 1) / 2), "frame_micro_f1": pytest.approx(4 / 6)}
    assert result["frame_micro_f1"] == pytest.approx(f1_score(truth, guess, average="micro"))
    with pytest.raises(ValueError, match="no class occurs"):
        MultiLabelFrameScores().compute(predictions=[[0]], references=[[0]])


@pytest.mark.parametrize(
    ("same", "different", "expected"),
    [
        ([0.9, 0.8], [0.2, 0.1], 0.0),
        ([0.1, 0.2], [0.8, 0.9], 1.0),
        ([0.9, 0.4], [0.6, 0.1], 0.5),
        # From (accepted 0, missed 1/3) at 0.8 to (1/2, 1/3) at 0.7: they meet at 1/3.
        ([0.9, 0.8, 0.3], [0.7, 0.2], 1 / 3),
    ],
)
def test_equal_error_rate(same, different, expected):
    scores, truth = [*same, *different], [1] * len(same) + [0] * len(different)
    assert EqualErrorRate().compute(predictions=scores, references=truth)["eer"] == pytest.approx(expected)


def test_equal_error_rate_of_two_gaussians():
    generator = np.random.default_rng(2)
    scores = np.concatenate([generator.normal(1, 1, 5000), generator.normal(-1, 1, 20000)])
    result = EqualErrorRate().compute(predictions=scores.tolist(), references=[1] * 5000 + [0] * 20000)
    assert result["eer"] == pytest.approx(NormalDist().cdf(-1), abs=0.01)
    assert result["eer_threshold"] == pytest.approx(0.0, abs=0.05)


def test_equal_error_rate_needs_both_kinds():
    with pytest.raises(ValueError, match="2 of 2 trials are of the same speaker"):
        EqualErrorRate().compute(predictions=[0.1, 0.2], references=[1, 1])


def test_phone_error_rate():
    # a substitution and a deletion of 5 phones
    assert PhoneErrorRate().compute(predictions=["h e l"], references=["h a l o"])["per"] == pytest.approx(2 / 4)
    pair = {"predictions": ["a b c", "d"], "references": ["a c", "d e"]}
    assert PhoneErrorRate().compute(**pair)["per"] == jiwer.wer(pair["references"], pair["predictions"])


def test_d_prime():
    rng = np.random.default_rng(0)
    truth = (rng.random((200, 3)) < 0.3).astype(int)
    scores = (truth + rng.normal(size=truth.shape)).astype(np.float32)
    areas = [roc_auc_score(truth[:, index], scores[:, index]) for index in range(3)]
    result = DPrime().compute(predictions=scores.tolist(), references=truth.tolist())
    assert result["auc"] == pytest.approx(np.mean(areas))
    assert result["d_prime"] == pytest.approx(np.mean([2**0.5 * NormalDist().inv_cdf(area) for area in areas]))
    # Unit-variance normals one apart have d' = 1, whatever the number of classes.
    assert result["d_prime"] == pytest.approx(1, abs=0.2)
    # A perfect class of 2 positives and 2 negatives: half a pair of 4 away from 1. One without positives is left out.
    perfect = DPrime().compute(
        predictions=[[0.9, 0], [0.8, 0], [0.1, 0], [0.2, 0]], references=[[1, 0]] * 2 + [[0, 0]] * 2
    )
    assert perfect["d_prime"] == pytest.approx(2**0.5 * NormalDist().inv_cdf(1 - 0.125))
    assert (perfect["auc"], perfect["classes"]) == (1, 1)
    with pytest.raises(ValueError, match="no class has both"):
        DPrime().compute(predictions=[[0.5]], references=[[1]])


def test_minimum_detection_cost():
    metric = MinimumDetectionCost()
    apart = {"predictions": [0.9, 0.8, 0.2, 0.1], "references": [1, 1, 0, 0]}
    assert metric.compute(**apart)["min_dcf"] == 0
    # Thresholds: above 0.7 misses one of two and accepts none: 0.05 * 0.5 / 0.05; below 0.6 costs 0.95 * 0.5 / 0.05.
    mixed = {"predictions": [0.9, 0.5, 0.6, 0.1], "references": [1, 1, 0, 0]}
    assert metric.compute(**mixed)["min_dcf"] == pytest.approx(0.5)
    # Where misses are 10 times dearer, the trial at 0.6 is accepted: 1 * 0.5 * 0.5 / min(5, 0.5).
    costs = metric.compute(**mixed, prior=0.5, cost_miss=10.0)
    assert costs["min_dcf"] == pytest.approx(0.5)
    backwards = {"predictions": [0.1, 0.2, 0.8, 0.9], "references": [1, 1, 0, 0]}
    assert metric.compute(**backwards)["min_dcf"] == 1  # rejects all
    with pytest.raises(ValueError, match="prior=2"):
        metric.compute(**apart, prior=2)
    with pytest.raises(ValueError, match="cost_miss=nan"):
        metric.compute(**apart, cost_miss=float("nan"))


@pytest.mark.parametrize("decimals", [1, 9])
def test_weights_count_rows_several_times(decimals):
    """As scikit-learn has it of rows repeated so often, of scores with ties and without."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        counts = rng.integers(0, 4, size=60)
        truth, scores = (rng.random((60, 5)) < 0.1).astype(int), rng.random((60, 5)).round(decimals)
        truth[:, 0], truth[:20, 1] = 0, 1  # a class without positives, a common one
        repeated = np.repeat(truth, counts, axis=0), np.repeat(scores, counts, axis=0)
        expected, _ = mean_average_precision(*repeated[::-1])
        assert weighted_average_precision(scores, truth)(counts) == pytest.approx(expected, abs=1e-12)
        rate, _ = equal_error_rate(repeated[1][:, 1], repeated[0][:, 1])
        assert weighted_equal_error_rate(scores[:, 1], truth[:, 1])(counts) == pytest.approx(rate, abs=1e-12)
    for score in (weighted_average_precision(scores, truth), weighted_equal_error_rate(scores[:, 1], truth[:, 1])):
        with pytest.raises(ValueError, match=r"no class|0 of"):
            score((truth.sum(axis=1) == 0).astype(int))
    for function in (weighted_average_precision, weighted_equal_error_rate):
        with pytest.raises(ValueError, match="NaN"):
            function(np.full((4, 1), np.nan), np.ones((4, 1), dtype=int))
