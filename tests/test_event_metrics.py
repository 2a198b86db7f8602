# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Event and segment metrics against cases worked out by hand, by the conventions of sed_eval."""

import evaluate
import pytest

from spear_hf.evaluation.event_metrics import EventF1, SegmentF1


def events(*items):
    return [{"label": label, "start": start, "end": end} for label, start, end in items]


def test_events_are_matched_by_label_and_onset():
    assert isinstance(EventF1(), evaluate.Metric)
    references = [events(("dog", 1.0, 2.0), ("cat", 3.0, 4.0)), events(("dog", 0.0, 1.0))]
    predictions = [events(("dog", 1.2, 5.0), ("dog", 3.0, 4.0)), events()]  # in time, though 200 ms late; wrong label
    result = EventF1().compute(predictions=predictions, references=references)
    assert result == pytest.approx({"event_f1": 2 / 5, "event_precision": 1 / 2, "event_recall": 1 / 3})
    late = EventF1().compute(predictions=[events(("dog", 1.21, 2.0))], references=[events(("dog", 1.0, 2.0))])
    assert late["event_f1"] == 0
    assert EventF1().compute(predictions=[events(("dog", 0.3, 1.0))], references=[events(("dog", 0.1, 1.0))])[
        "event_f1"
    ]


def test_the_most_matches_are_made():
    """The first prediction is near both references, the second near the first one only."""
    references = [events(("dog", 1.0, 2.0), ("dog", 1.3, 2.0))]
    predictions = [events(("dog", 1.15, 2.0), ("dog", 0.85, 2.0))]
    assert EventF1().compute(predictions=predictions, references=references)["event_f1"] == 1
    # One reference is not matched twice.
    twice = [events(("dog", 1.0, 2.0), ("dog", 1.1, 2.0))]
    result = EventF1().compute(predictions=twice, references=[events(("dog", 1.0, 2.0))])
    assert (result["event_precision"], result["event_recall"]) == (0.5, 1)


def test_offsets_count_where_asked():
    references = [events(("dog", 1.0, 3.0))]
    for end, right in ((3.9, 1), (4.1, 0), (2.1, 1)):  # half of its length is a second
        predictions = [events(("dog", 1.0, end))]
        assert EventF1().compute(predictions=predictions, references=references, with_offset=True)["event_f1"] == right
    short = [events(("dog", 1.0, 1.1))]  # the collar is the larger reach
    near = EventF1().compute(predictions=[events(("dog", 1.0, 1.3))], references=short, with_offset=True)
    assert near["event_f1"] == 1


def test_segments():
    # Seconds of references: dog 0, 1; cat 1, 2. Of predictions: dog 0; bird 1; cat 2, 3.
    references = [events(("dog", 0.5, 1.5), ("cat", 1.9, 2.1))]
    predictions = [events(("dog", 0.0, 1.0), ("bird", 1.0, 2.0), ("cat", 2.5, 3.5))]
    result = SegmentF1().compute(predictions=predictions, references=references)
    assert result["segment_precision"] == pytest.approx(2 / 4)
    assert result["segment_recall"] == pytest.approx(2 / 4)
    assert result["segment_f1"] == pytest.approx(0.5)
    # Second 1: dog and cat missing, bird inserted: a substitution and a deletion; second 3: an insertion.
    assert result["segment_er"] == pytest.approx(3 / 4)
    exact = SegmentF1().compute(predictions=references, references=references)
    assert (exact["segment_f1"], exact["segment_er"]) == (1, 0)
    half = SegmentF1().compute(predictions=predictions, references=references, resolution=10.0)
    assert half["segment_f1"] == pytest.approx(2 * 2 / (3 + 2))


def test_no_events():
    none = EventF1().compute(predictions=[events()], references=[events()])
    assert none["event_f1"] == 0
    with pytest.raises(ValueError, match="no event"):
        SegmentF1().compute(predictions=[events()], references=[events()])


def test_what_is_no_event():
    """Times that are no numbers matched nothing, and a negative resolution gave full marks."""
    whole = events(("a", 0.0, 1.0))
    for wrong in (("a", float("nan"), 1.0), ("a", 2.0, 1.0), ("a", 0.0, float("inf")), (None, 0.0, 1.0)):
        for metric in (EventF1(), SegmentF1()):
            with pytest.raises(ValueError, match="is no event"):
                metric.compute(predictions=[events(wrong)], references=[whole])
    with pytest.raises(ValueError, match="resolution=-1"):
        SegmentF1().compute(predictions=[whole], references=[whole], resolution=-1.0)
    with pytest.raises(ValueError, match="collar=nan"):
        EventF1().compute(predictions=[whole], references=[whole], collar=float("nan"))
