# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The parts of fine-tuning: batches, orders, learning rates, freezing, and that a resumed training is the same."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearForCTC, SpearForSequenceClassification
from spear_hf.data.audio import AudioError
from spear_hf.data.segments import FrameGrid, Segment, read_segments
from spear_hf.finetuning.arguments import FineTuningArguments, ModelArguments, parse_arguments
from spear_hf.finetuning.collation import ClassificationCollator, CTCCollator, FrameCollator, mix
from spear_hf.finetuning.epochs import EpochCounter
from spear_hf.finetuning.optimization import FreezeThenThaw, scale_learning_rate
from spear_hf.finetuning.sampling import LengthGroupedSampler, WeightedSampler, balancing_weights
from spear_hf.finetuning.trainer import CTCTrainer, FineTuningTrainer
from spear_hf.finetuning.transcripts import character_tokenizer, normalize
from spear_hf.finetuning.trials import all_pairs, cosine_scores, read_trials

from .test_finetuning_datasets import write_wav


TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "stem_channels": [2, 2, 4],
    "num_attention_heads": 2,
    "query_head_dim": 4,
    "value_head_dim": 4,
    "num_layers_per_stack": [1, 1],
    "downsampling_factors": [1, 2],
    "conv_kernel_sizes": [5, 5],
    "classifier_proj_size": 8,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Ten rows of noise of 0.2 to 0.65 s, with ids, lengths and labels."""
    folder = tmp_path_factory.mktemp("audio")
    result = []
    for index in range(10):
        samples = 3200 + 800 * index
        path = write_wav(folder / f"{index}.wav", samples, seed=index)
        audio = {"path": str(path), "bytes": None}
        result.append({"id": f"row{index}", "audio": audio, "length": samples, "labels": [index % 3]})
    return result


def at_epoch(epoch):
    counter = EpochCounter()
    state = type("State", (), {"epoch": epoch})
    counter.on_epoch_begin(None, state, None)
    return counter


# ---------------------------------------------------------------------------------------------------------------------
# Collation
# ---------------------------------------------------------------------------------------------------------------------


def test_ctc_batches(rows):
    batch = CTCCollator(SpearFeatureExtractor())([{**rows[0], "labels": [5, 6, 7]}, {**rows[9], "labels": [8]}])
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch["input_features"].shape == (2, 65, 128)
    assert batch["attention_mask"].sum(dim=1).tolist() == [20, 65]


def test_a_bad_file_is_named(rows, tmp_path):
    (tmp_path / "bad.wav").write_text("no audio")
    row = {**rows[0], "audio": {"path": str(tmp_path / "bad.wav"), "bytes": None}}
    with pytest.raises(AudioError, match=r"bad\.wav cannot be decoded"):
        CTCCollator(SpearFeatureExtractor())([row])


def test_crops(rows):
    training = [
        ClassificationCollator(SpearFeatureExtractor(), 0.25, seed=3, epochs=at_epoch(epoch)) for epoch in (0, 0, 1)
    ]
    first, again, later = (collator.crops(rows) for collator in training)
    assert [start for _, start in first] == [start for _, start in again]
    assert [start for _, start in first] != [start for _, start in later]
    assert [len(waveform) for waveform, _ in first] == [3200, *[4000] * 9]
    assert first[0][1] == 0
    assert len({start for _, start in first[1:]}) > 4
    # In evaluation, the middle; alone as in a batch.
    evaluation = ClassificationCollator(SpearFeatureExtractor(), 0.25)
    assert [start for _, start in evaluation.crops(rows)] == [0, *(400 * index for index in range(9))]
    assert evaluation.crops(rows[5:6])[0][1] == 1600


def test_labels_of_classes(rows):
    single = ClassificationCollator(SpearFeatureExtractor())(rows[:3])
    assert single["labels"].tolist() == [0, 1, 2]
    several = ClassificationCollator(SpearFeatureExtractor(), num_labels=3)
    assert several([{**rows[0], "labels": [0, 2]}, {**rows[1], "labels": []}])["labels"].tolist() == [
        [1.0, 0.0, 1.0],
        [0.0, 0.0, 0.0],
    ]


def test_mixup_is_a_weighted_sum_of_two_rows():
    waveforms = [np.full(4, 1.0, np.float32), np.full(2, 10.0, np.float32)]
    labels = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    mixed, shares = mix(waveforms, labels, 1.0, np.random.default_rng(0))
    for row, other in ((0, 1), (1, 0)):
        weight = shares[row, row]
        assert 0 < weight < 1
        assert shares[row, other] == pytest.approx(1 - weight)
        assert mixed[row][0] == pytest.approx(weight * waveforms[row][0] + (1 - weight) * waveforms[other][0])
        assert len(mixed[row]) == len(waveforms[row])
    assert mixed[0][3] == pytest.approx(shares[0, 0])  # the other has ended
    assert waveforms[0].tolist() == [1.0] * 4  # the originals are as they were
    unmixed, same = mix(waveforms, labels, 0.0, np.random.default_rng(0))
    assert np.array_equal(same, labels)
    assert np.array_equal(unmixed[0], waveforms[0])


def test_mixup_share_and_distribution():
    labels = np.eye(2000, dtype=np.float32)
    _, shares = mix([np.zeros(1, np.float32)] * 2000, labels, 0.5, np.random.default_rng(0))
    weights = np.diag(shares)
    assert (weights < 1).mean() == pytest.approx(0.5, abs=0.05)
    assert weights[weights < 1].mean() == pytest.approx(0.5, abs=0.02)
    assert np.allclose(shares.sum(axis=1), 1)
    assert weights[weights < 1].std() == pytest.approx((1 / (4 * 21)) ** 0.5, abs=0.01)  # of Beta(10, 10)


def test_mixup_is_a_function_of_seed_epoch_and_rows(rows):
    def batch(seed, epoch, chosen):
        collator = ClassificationCollator(
            SpearFeatureExtractor(), num_labels=3, mixup=0.5, seed=seed, epochs=at_epoch(epoch)
        )
        return collator(chosen)["labels"]

    assert torch.equal(batch(0, 2, rows), batch(0, 2, rows))
    assert not torch.equal(batch(0, 2, rows), batch(0, 3, rows))
    assert not torch.equal(batch(0, 2, rows), batch(1, 2, rows))
    evaluation = ClassificationCollator(SpearFeatureExtractor(), num_labels=3, mixup=0.5)
    assert set(evaluation(rows)["labels"].flatten().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match=r"mixup=0\.5 mixes labels"):
        ClassificationCollator(SpearFeatureExtractor(), mixup=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2])
def test_frame_grid_is_that_of_the_model(factor):
    model = SpearForCTC(SpearConfig(**TINY, output_downsampling_factor=factor)).eval()
    grid = FrameGrid(factor)
    for frames in (9, 10, 65, 66, 67, 68):
        assert grid.frames(frames) == model._get_feat_extract_output_lengths(frames)
    # What the stem's frame 20 depends on is centred where the grid says its centre is.
    features = torch.randn(1, 100, 128, requires_grad=True)
    model.spear.stem(features)[0, 20].sum().backward()
    seen = features.grad[0].abs().sum(dim=1).nonzero().flatten()
    centre = (seen.min() + seen.max()).item() / 2 * 0.01 + 0.005  # a frame of the filter bank is 10 ms
    assert FrameGrid(1).centres(21)[20] == pytest.approx(centre)
    pairs = FrameGrid(1).centres(20).reshape(10, 2).mean(axis=1)
    assert np.allclose(FrameGrid(2).centres(10), pairs)


def test_frame_labels(rows):
    grid, label2id = FrameGrid(), {"none": 0, "a": 1, "b": 2}
    segments = [Segment(0.065, 0.11, "a"), Segment(0.11, 0.13, "b")]  # centres: 0.045, 0.065, 0.085, 0.105, 0.125, ...
    assert grid.labels(segments, 6, 0.0, label2id, 0, "x").tolist() == [0, 1, 1, 1, 2, 0]
    assert grid.labels(segments, 3, 0.04, label2id, 0, "x").tolist() == [1, 1, 2]
    overlapping = [Segment(0.0, 0.07, "a"), Segment(0.06, 0.09, "b")]
    hot = grid.labels(overlapping, 4, 0.0, {"a": 0, "b": 1}, None, "x")
    assert hot.tolist() == [[1, 0], [1, 1], [0, 1], [0, 0]]
    with pytest.raises(ValueError, match=r"x has several labels at 0\.0[67] s.*--multi_label"):
        grid.labels(overlapping, 4, 0.0, label2id, 0, "x")
    with pytest.raises(ValueError, match="x has a segment 'c'"):
        grid.labels([Segment(0, 1, "c")], 4, 0.0, label2id, 0, "x")


def test_frame_batches_follow_their_crops(rows):
    label2id = {"none": 0, "a": 1}
    common = {"grid": FrameGrid(), "label2id": label2id, "background": 0}
    marked = [{**row, "segments": [{"start": 0.2, "end": 0.3, "label": "a"}]} for row in (rows[0], rows[9])]
    batch = FrameCollator(SpearFeatureExtractor(), **common)(marked)
    assert batch["labels"].shape == (2, 29)
    assert batch["labels"][0].tolist() == [0] * 6 + [-100] * 23
    assert batch["labels"][1].nonzero().flatten().tolist() == [8, 9, 10, 11, 12]  # 0.205 to 0.285 s
    # The middle 0.25 s of 0.65 begin at 0.2 s: frame 0 is at 0.245 s.
    cropped = FrameCollator(SpearFeatureExtractor(), 0.25, **common)(marked[1:])
    assert cropped["labels"][0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    multi = FrameCollator(SpearFeatureExtractor(), grid=FrameGrid(), label2id={"a": 0}, background=None)(marked)
    assert multi["labels"].shape == (2, 29, 1)
    assert multi["labels"][0, 6:].unique().tolist() == [-100.0]


def test_segment_tables(tmp_path):
    table = tmp_path / "segments.tsv"
    table.write_text("id\tstart\tend\tlabel\nx.wav\t1.5\t2\tdog\nx.wav\t0\t1\tcat\ny.wav\t0\t3\tdog\n")
    expected = {"x.wav": [Segment(0, 1, "cat"), Segment(1.5, 2, "dog")], "y.wav": [Segment(0, 3, "dog")]}
    assert read_segments(str(table)) == expected
    lines = tmp_path / "segments.jsonl"
    lines.write_text('{"id": "x", "start": 0, "end": 1, "label": "cat"}\n\n')
    assert read_segments(str(lines)) == {"x": [Segment(0, 1, "cat")]}
    for row, message in (
        ("x,2,1,dog", "0 <= start < end"),
        ("x,a,1,dog", "must be seconds"),
        ("x,,1,dog", "no start"),
    ):
        bad = tmp_path / "bad.csv"
        bad.write_text(f"id,start,end,label\n{row}\n")
        with pytest.raises(ValueError, match=f"bad.csv, line 2: .*{message}"):
            read_segments(str(bad))
    with pytest.raises(ValueError, match=r"segments=none\.csv must be an existing table"):
        read_segments("none.csv")


# ---------------------------------------------------------------------------------------------------------------------
# Orders, transcripts, trials
# ---------------------------------------------------------------------------------------------------------------------


class EpochOf:
    """A collator that gives the epoch."""

    def __init__(self, epochs):
        self.epochs = epochs

    def __call__(self, rows):
        return self.epochs.value


def test_epochs_reach_living_workers():
    counter = at_epoch(0)
    loader = DataLoader([1, 2], batch_size=1, num_workers=1, persistent_workers=True, collate_fn=EpochOf(counter))
    assert list(loader) == [0, 0]
    counter.on_epoch_begin(None, type("State", (), {"epoch": 3.0}), None)
    assert list(loader) == [3, 3]


def test_balancing_weights():
    weights = balancing_weights([[0], [0], [0, 1], [], [0]], 2)
    assert weights.tolist() == [0.25, 0.25, 1.25, 0.25, 0.25]
    with pytest.raises(ValueError, match="none of the 2 rows has a label"):
        balancing_weights([[], []], 2)


def test_weighted_sampler():
    weights = np.array([1.0] * 900 + [9.0] * 100)  # as if of two classes of 900 and 100 rows
    drawn = list(WeightedSampler(weights, 0, at_epoch(1)))
    assert len(drawn) == 1000
    assert np.mean(np.array(drawn) >= 900) == pytest.approx(0.5, abs=0.05)
    assert drawn == list(WeightedSampler(weights, 0, at_epoch(1)))
    assert drawn != list(WeightedSampler(weights, 0, at_epoch(2)))
    assert drawn != list(WeightedSampler(weights, 1, at_epoch(1)))


def test_length_grouped_sampler():
    lengths = np.random.default_rng(0).integers(1, 1000, 400)
    orders = [list(LengthGroupedSampler(lengths, 4, 0, at_epoch(epoch))) for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(400))
    spread = np.ptp(lengths[orders[0]].reshape(-1, 4), axis=1).mean()
    assert spread < 0.1 * np.ptp(lengths.reshape(-1, 4), axis=1).mean()


def test_normalized_transcripts():
    assert normalize("Zürich -- it’s 5 o'clock!\n") == "zürich it's 5 o'clock"
    assert normalize("ПРИВЕТ, мир…") == "привет мир"
    assert normalize("नमस्ते।") == "नमस्ते"  # marks are kept
    assert normalize("?!") == ""


def test_character_tokenizer(tmp_path):
    tokenizer = character_tokenizer(["it's on", "no it"])
    assert len(tokenizer) == 3 + len("'inost")
    assert tokenizer.pad_token_id == 0
    ids = tokenizer("no it's").input_ids
    assert tokenizer.decode(ids, group_tokens=False) == "no it's"
    assert tokenizer.decode([0, ids[0], ids[0], 0, ids[0], ids[1]]) == "nno"
    assert tokenizer.get_vocab() == character_tokenizer(["no it", "on it's"]).get_vocab()
    with pytest.raises(ValueError, match="hold no character"):
        character_tokenizer([""])


def test_trials(tmp_path):
    pairs, same = all_pairs(["x", "y", "x"])
    assert pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert same.tolist() == [0, 1, 0]
    embeddings = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert cosine_scores(embeddings, pairs) == pytest.approx([0.0, 0.5**0.5, 0.5**0.5])
    with pytest.raises(ValueError, match="2 evaluation rows of 2 speakers give 0 pairs of the same"):
        all_pairs(["x", "y"])
    trials = tmp_path / "trials.txt"
    trials.write_text("1 a b\n0 a c\n")
    pairs, same = read_trials(str(trials), ["c", "b", "a"])
    assert pairs.tolist() == [[2, 1], [2, 0]]
    assert same.tolist() == [1, 0]
    for text, message in (("2 a b", "must read"), ("1 a z", "'z' is not among the 3"), ("", "lists no trial")):
        trials.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_trials(str(trials), ["a", "b", "c"])


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Recorder(EpochCounter):
    """Keeps a copy of some parameters, whether they are trained, and the learning rates after every step."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head, self.rates = [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.record(kwargs["model"])

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.record(kwargs["model"])
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def record(self, model):
        self.encoder.append(torch.cat([value.detach().flatten() for value in model.spear.parameters()]).clone())
        self.head.append(model.classifier.weight.detach().clone())


def build_trainer(folder, rows, recorder=None, multi_label=False, **settings):
    torch.manual_seed(0)
    problem = "multi_label_classification" if multi_label else "single_label_classification"
    model = SpearForSequenceClassification(SpearConfig(**TINY, num_labels=3, problem_type=problem))
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = FineTuningArguments(**{**defaults, **settings})
    epochs = recorder or EpochCounter()
    extractor = SpearFeatureExtractor()
    common = {"num_labels": 3 if multi_label else None}
    return FineTuningTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        data_collator=ClassificationCollator(
            extractor, 0.3, seed=1, epochs=epochs, mixup=0.5 if multi_label else 0.0, **common
        ),
        eval_collator=ClassificationCollator(extractor, **common),
        epochs=epochs,
        sampling_weights=balancing_weights([row["labels"] for row in rows], 3) if multi_label else None,
    )


def test_encoder_learning_rate_and_weight_decay(rows, tmp_path):
    settings = {"encoder_learning_rate_scale": 0.05, "weight_decay": 0.1, "warmup_steps": 2, "max_steps": 4}
    recorder = Recorder()
    trainer = build_trainer(tmp_path, rows, recorder, **settings)
    trainer.train()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = set()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["initial_lr"] == pytest.approx(1e-2 * (0.05 if name.startswith("spear.") else 1)), name
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0), name
    assert seen == set(names.values())
    # The schedule warms both up and keeps the ratio.
    for rates in recorder.rates:
        assert min(rates) == pytest.approx(0.05 * max(rates))
    assert len({max(rates) for rates in recorder.rates}) > 2


def test_scale_learning_rate_leaves_other_groups_alone():
    first, second, third = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = torch.optim.AdamW([{"params": [first, second], "weight_decay": 0.5}, {"params": [third]}], lr=1.0)
    scale_learning_rate(optimizer, [second], 0.1)
    assert [
        (group["params"][0] is wanted, group["lr"], group["weight_decay"])
        for group, wanted in zip(optimizer.param_groups, (first, second, third))
    ] == [(True, 1.0, 0.5), (True, 0.1, 0.5), (True, 1.0, 0.01)]


def test_freeze_then_thaw(rows, tmp_path):
    recorder = Recorder()
    trainer = build_trainer(tmp_path, rows, recorder, freeze_encoder_steps=3, max_steps=5)
    trainer.train()
    changed = [not torch.equal(before, after) for before, after in zip(recorder.encoder, recorder.encoder[1:])]
    assert changed == [False, False, False, True, True]
    assert all(not torch.equal(before, after) for before, after in zip(recorder.head, recorder.head[1:]))
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_compiled_encoder_is_thawed():
    """Graphs that were made while parameters had no gradients are not made anew by torch when they have."""
    model = torch.nn.Module()
    model.base_model, model.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
    compiled = torch.compile(lambda x: model.head(model.base_model(x)).sum(), backend="aot_eager")
    callback, state = FreezeThenThaw(1), type("State", (), {"global_step": 0, "max_steps": 2})
    callback.on_train_begin(None, state, None, model=model)
    for step in range(2):
        state.global_step = step
        callback.on_step_begin(None, state, None)
        compiled(torch.ones(3, 4)).backward()
        assert (model.base_model.weight.grad is not None) is (step == 1)


def test_frozen_for_good(rows, tmp_path):
    recorder = Recorder()
    trainer = build_trainer(tmp_path, rows, recorder, freeze_encoder_steps=-1, max_steps=3)
    trainer.train()
    assert torch.equal(recorder.encoder[0], recorder.encoder[-1])
    assert not torch.equal(recorder.head[0], recorder.head[-1])


def test_thawed_parameters_are_reduced_over_ranks(rows, tmp_path):
    """DistributedDataParallel as the Trainer wraps: around the thawed model, before the callback freezes it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = SpearForSequenceClassification(SpearConfig(**TINY, num_labels=3)).eval()
        batch = ClassificationCollator(SpearFeatureExtractor())(rows[:3])
        model(**batch).loss.backward()
        expected = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        model.zero_grad()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)

        def twice(_, bucket):  # in place of the mean over ranks: shows what has gone through it
            future = torch.futures.Future()
            future.set_result(bucket.buffer() * 2)
            return future

        wrapped.register_comm_hook(None, twice)
        callback = FreezeThenThaw(2)
        state = type("State", (), {"global_step": 0, "max_steps": 4})
        callback.on_train_begin(None, state, None, model=model)
        for step in range(4):
            state.global_step = step
            callback.on_step_begin(None, state, None)
            model.zero_grad()
            wrapped(**batch).loss.backward()
            for name, value in model.named_parameters():
                if step < 2 and name.startswith("spear."):
                    assert value.grad is None, name
                elif name in expected:
                    assert torch.allclose(value.grad, 2 * expected[name], rtol=1e-4, atol=1e-7), (step, name)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("multi_label", [False, True], ids=["group_by_length", "weighted sampling and mixup"])
def test_resumed_training_equals_an_uninterrupted_one(rows, tmp_path, multi_label):
    # Four steps an epoch: the checkpoint is in the second one, before the encoder thaws. Dropout is on.
    settings = {
        "multi_label": multi_label,
        "train_sampling_strategy": "group_by_length",
        "freeze_encoder_steps": 7,
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 6,
        "save_total_limit": 5,
        "warmup_steps": 3,
    }
    whole = build_trainer(tmp_path / "whole", rows, **settings)
    whole.train()
    resumed = build_trainer(tmp_path / "resumed", rows, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, resumed)
    ]
    assert len(losses[0]) == 10
    assert losses[0] == losses[1]
    for (name, expected), value in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(expected, value), name
    state = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6


def test_evaluation_is_in_order_and_uncropped(rows, tmp_path):
    trainer = build_trainer(tmp_path, rows, train_sampling_strategy="group_by_length", per_device_eval_batch_size=3)
    shapes = [batch["input_features"].shape for batch in trainer.get_eval_dataloader()]
    assert shapes == [(3, 30, 128), (1, 35, 128)]
    assert trainer.predict(trainer.eval_dataset).label_ids.tolist() == [0, 1, 2, 0]
    assert next(iter(trainer.get_train_dataloader()))["input_features"].shape[1] <= 30  # cropped to 0.3 s


def test_ctc_predictions_do_not_depend_on_the_batch(rows, tmp_path):
    torch.manual_seed(0)
    model = SpearForCTC(SpearConfig(**TINY, vocab_size=8))
    args = FineTuningArguments(output_dir=str(tmp_path), disable_tqdm=True, use_cpu=True)
    collator = CTCCollator(SpearFeatureExtractor())
    dataset = Dataset.from_list(rows)
    trainer = CTCTrainer(model=model, args=args, data_collator=collator, eval_collator=collator, epochs=EpochCounter())
    together = trainer.predict(dataset).predictions
    for index in (0, 4, 9):
        alone = trainer.predict(dataset.select([index])).predictions[0]
        frames = len(alone)
        assert together[index, :frames].tolist() == alone.tolist()
        assert (alone >= 0).all()
        assert (together[index, frames:] == -100).all()


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def test_arguments(tmp_path, capsys):
    def parse(*given):
        return parse_arguments("help", given, ["--max_steps", "5"], [FineTuningArguments, ModelArguments])[0]

    assert parse("--smoke").max_steps == 5
    assert parse("--smoke", "--max_steps", "7").max_steps == 7
    assert parse().do_train
    assert parse().do_eval
    assert not parse("--do_eval").do_train
    assert parse("--metric_for_best_model", "eval_wer").greater_is_better is False  # or the worst model is kept
    assert parse("--metric_for_best_model", "accuracy").greater_is_better is True
    assert parse("--eval_strategy", "epoch").do_train  # which transformers takes for --do_eval
    assert parse("--freeze_encoder_steps", "3").ddp_find_unused_parameters is True

    folder = tmp_path / "run"
    for given, message in (
        (["--encoder_learning_rate_scale", "-1"], "encoder_learning_rate_scale=-1.0 must be 0 or more"),
        (["--freeze_encoder_steps", "-2"], "freeze_encoder_steps=-2"),
        (["--resume_from_checkpoint", "last"], "holds no checkpoint"),
        (["--resume_from_checkpoint", str(tmp_path / "nowhere")], "is no folder"),
        (["--learnin_rate", "1"], "learnin_rate"),
        (["--do_predict"], "do_predict=True"),
    ):
        with pytest.raises((SystemExit, ValueError)) as caught:
            parse("--output_dir", str(folder), *given)
        assert message in capsys.readouterr().err + str(caught.value)
    for number in (3, 12, 20, 30):
        (folder / f"checkpoint-{number}").mkdir(parents=True)
    for number, state in ((3, "{}"), (12, "{}"), (20, '{"epoch": 1')):  # the last one was not finished
        (folder / f"checkpoint-{number}" / "trainer_state.json").write_text(state, encoding="utf-8")
    with pytest.raises(SystemExit):
        parse("--output_dir", str(folder))
    assert "--resume_from_checkpoint last goes on" in capsys.readouterr().err
    given = ["--output_dir", str(folder), "--resume_from_checkpoint", "last"]
    assert parse(*given).resume_from_checkpoint == str(folder / "checkpoint-12")
