#!/usr/bin/env python3
# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The whole way on the bundled audio, on a CPU in minutes: tokens, pre-training, embeddings, a probe, a model card.

    make demo                                           # this script, in a virtual environment
    python examples/demo.py --output runs/demo          # the same; run again after Ctrl-C, it goes on
    python examples/demo.py --output runs/demo --force  # from the beginning

Each stage is what a user would do on audio of their own, and prints the command that does it:

    quantize   OUTPUT/tokenizer     a multi-codebook quantiser of the features of a teacher (MFCC: nothing to download)
    tokenize   OUTPUT/tokens        the tokens of the training and held-out clips
    pretrain   OUTPUT/pretraining   a small SPEAR learns to predict the tokens of masked frames
    embed      OUTPUT/embeddings.safetensors   the held-out clips, by the model that AutoModel loads
    probe      OUTPUT/probe.json    ABX tests of words across voices on the frozen encoder, against the same encoder
                                    before training and against log-mel; and a linear probe of instruments
    plot       OUTPUT/plots         loss, masked accuracy, probe by layer, a spectrogram with its tokens

and at the end OUTPUT/report.json and the model's card, OUTPUT/pretraining/final/README.md. A finished stage leaves
OUTPUT/stages/NAME.json and is passed over the next time. The exit code is 0 if the trained model beats both baselines
clearly, 1 if it does not or something failed, 75 or 130 if it was interrupted.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import spear_hf
from spear_hf import SpearFeatureExtractor
from spear_hf.data.commands import DataOptions
from spear_hf.data.manifest import Utterance, read_manifest
from spear_hf.evaluation.card import write_card
from spear_hf.evaluation.embedding import embed_to_file, load_encoder
from spear_hf.evaluation.probe import (
    ProbeResult,
    concatenated,
    frame_states,
    linear_probe,
    log_mel_features,
    log_mel_frames,
    paired_difference,
    pooled_features,
)
from spear_hf.evaluation.retrieval import match_recordings
from spear_hf.mvq.commands import run_quantize, run_tokenize
from spear_hf.mvq.store import TokenStore
from spear_hf.pretraining.command import INTERRUPTED, run_pretraining
from spear_hf.pretraining.config import load_config
from spear_hf.pretraining.metrics import read_json_lines
from spear_hf.pretraining.setup import build_model


ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "data"
CARD_TEMPLATE = ROOT / "model_cards" / "template.md"
TEACHER = "kaldi-mfcc"
WORDS, INSTRUMENTS = "spoken_words", "instrument_family"
TRAINING = ["pretrain", "probe_train"]  # splits to pre-train on, without labels
# What "clearly" means: masked accuracy this many times the unigram's, and a probe gain whose 95 % interval is above 0.
CLEARLY = 2.0


@dataclass(frozen=True)
class Settings:
    """What the results depend on. A folder holds results of one of these only."""

    config: str = "examples/configs/demo.yaml"
    """Of the pre-training, relative to the repository; its target says how many codebooks, of what size."""
    overrides: tuple[str, ...] = ()
    """Settings of it to change, as --set takes them."""
    quantizer_steps: int = 150
    """Steps of each of the two phases of the quantiser's training."""
    normalize: bool = False
    """Whether the quantiser standardises the MFCCs. Raw, as in HuBERT's first iteration: standardised, two thirds of
    the tokens' bits describe the deltas, which jump from frame to frame, and masked ones can hardly be predicted."""
    clips: dict[str, int] = field(default_factory=dict)
    """Split -> clips to use of it, and of each of its probes; all of them where nothing is named."""


FULL = Settings()
# A few seconds of everything: shows that the parts fit together, learns nothing.
SMOKE = Settings(
    overrides=("max_steps=4", "schedule.warmup_steps=1", "schedule.decay_steps=4", "logging.validate_every=2"),
    quantizer_steps=5,
    clips={"pretrain": 24, "heldout": 6, "probe_train": 30, "probe_test": 30},
)


class Interrupted(Exception):
    """The pre-training was told to stop and has saved a checkpoint."""


class StageError(RuntimeError):
    """A stage that did not do its work; what is wrong has been printed."""


class Demo:
    """A demo's folder, with the stages that have been done in it."""

    def __init__(self, output: Path, settings: Settings) -> None:
        self.output = output
        self.settings = settings
        self.earlier = {"seconds": 0.0, "cpu_seconds": 0.0}  # what earlier, interrupted runs of the demo took
        self.manifest = DATA / "manifest.jsonl" if not settings.clips else output / "manifest.jsonl"
        self.tokenizer = output / "tokenizer"
        self.tokens = output / "tokens"
        self.pretraining = output / "pretraining"
        self.final = self.pretraining / "final"
        self.embeddings = output / "embeddings.safetensors"
        self.probe = output / "probe.json"
        self.plots = output / "plots"
        self.report = output / "report.json"
        self.config = load_config(ROOT / settings.config, self.overrides)

    def prepare(self, force: bool) -> None:
        """Makes the folder, or checks that it is of these settings; with `force` it begins anew."""
        marker = self.output / "settings.json"
        wanted = json.loads(json.dumps(asdict(self.settings)))
        if force and self.output.exists():
            if any(self.output.iterdir()) and not marker.is_file():
                raise ValueError(f"{self.output} is not the folder of a demo (no settings.json): --force keeps it.")
            shutil.rmtree(self.output)
        if marker.is_file():
            if json.loads(marker.read_text(encoding="utf-8")) != wanted:
                raise ValueError(
                    f"{self.output} holds a demo with other settings: choose another --output, or --force."
                )
            return
        if self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"{self.output} is not empty and not the folder of a demo: choose another --output.")
        self.output.mkdir(parents=True, exist_ok=True)
        if self.settings.clips:
            self._write_manifest()
        write_json(marker, wanted)

    def _write_manifest(self) -> None:
        """A part of the bundled manifest: clips at equal distances in each split, so of all domains and classes."""
        lines = (DATA / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        kept: list[dict] = []
        for split, count in self.settings.clips.items():
            for probe in (None, WORDS, INSTRUMENTS):
                rows = [row for row in map(json.loads, lines) if (row["split"], row["probe"]) == (split, probe)]
                kept += rows[:: max(1, len(rows) // count)][:count]
        for row in kept:
            row["path"] = os.path.relpath(DATA / row["path"], self.output)
        self.manifest.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def utterances(self, *splits: str, task: str | None = None) -> list[Utterance]:
        """Of the manifest, in its order."""
        return [utt for utt in read_manifest(self.manifest, split=splits) if task is None or utt.probe == task]

    # ------------------------------------------------------------------------------------------------------ stages

    def record(self, name: str) -> dict[str, Any]:
        """What is known of a stage: complete, seconds, cpu_seconds, peak_memory_mb, runs."""
        path = self.output / "stages" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def run(self) -> dict[str, Any]:
        """All that is still to be done; the report."""
        records = [self.record(name) for name in STAGES]
        if self.report.is_file() and all(record.get("complete") for record in records):
            print(f"{shown(self.output)} holds a finished demo; --force makes a new one.")
        else:
            self.earlier = {key: sum(record.get(key, 0.0) for record in records) for key in self.earlier}
            for name, work in STAGES.items():
                self._run_stage(name, work)
            self.write_report()
        return json.loads(self.report.read_text(encoding="utf-8"))

    def _run_stage(self, name: str, work: Callable[["Demo"], None]) -> None:
        """Runs a stage unless it is complete, and records what it cost, over all its runs if it was interrupted."""
        before = self.record(name)
        if before.get("complete"):
            print(f"\n== {name}: done before, in {before['seconds']:.0f} s", flush=True)
            return
        print(f"\n== {name}", flush=True)
        start, cpu_start, complete = time.perf_counter(), time.process_time(), False
        try:
            work(self)
            complete = True
        finally:
            write_json(
                self.output / "stages" / f"{name}.json",
                {
                    "complete": complete,
                    "seconds": round(before.get("seconds", 0.0) + time.perf_counter() - start, 2),
                    "cpu_seconds": round(before.get("cpu_seconds", 0.0) + time.process_time() - cpu_start, 2),
                    "peak_memory_mb": round(max(before.get("peak_memory_mb", 0.0), peak_memory_mb()), 1),
                    "runs": before.get("runs", 0) + 1,
                },
            )

    def quantize(self) -> None:
        target = self.config.targets["speech"]
        show(
            f"spear-hf quantize --teacher {TEACHER} --data {shown(self.manifest)} "
            f"--split {' --split '.join(TRAINING)} "
            f"--codebooks {target.num_codebooks} --codebook-size {target.codebook_size} "
            f"{'' if self.settings.normalize else '--no-normalize '}--steps {self.settings.quantizer_steps} "
            f"--output {shown(self.tokenizer)}"
        )
        code = run_quantize(
            DataOptions(str(self.manifest), TRAINING),
            self.tokenizer,
            TEACHER,
            device="cpu",
            overwrite=True,
            num_codebooks=target.num_codebooks,
            codebook_size=target.codebook_size,
            normalize=self.settings.normalize,
            steps=self.settings.quantizer_steps,
        )
        check(code)

    def tokenize(self) -> None:
        show(
            f"spear-hf tokenize --tokenizer {shown(self.tokenizer)} --data {shown(self.manifest)} "
            f"--split {' --split '.join([*TRAINING, 'heldout'])} --output {shown(self.tokens)}"
        )
        data = DataOptions(str(self.manifest), [*TRAINING, "heldout"])
        check(run_tokenize(data, self.tokens, str(self.tokenizer), device="cpu"))

    @property
    def overrides(self) -> list[str]:
        """Of the configuration: this run's data, tokens and folder."""
        return [
            *self.settings.overrides,
            f"output_dir={self.pretraining.resolve()}",
            f"data.manifest={self.manifest.resolve()}",
            f"targets.speech.store={self.tokens.resolve()}",
        ]

    def pretrain(self) -> None:
        resume = self.pretraining.is_dir()
        config = ROOT / self.settings.config
        options = " ".join(self.overrides).replace(f"={Path.cwd()}{os.sep}", "=")
        show(f"spear-hf pretrain --config {shown(config)} --set {options}{' --resume' * resume}")
        code = run_pretraining(str(config), self.overrides, resume=resume)
        if code == INTERRUPTED:
            raise Interrupted
        check(code)

    def embed(self) -> None:
        encoder = self.final / "encoder"
        show(f"spear-hf embed --model {shown(encoder)} --output {shown(self.embeddings)} HELD-OUT-CLIPS")
        clips = [utterance.path for utterance in self.utterances("heldout")]
        bad = embed_to_file(clips, encoder, self.embeddings, device="cpu")
        for result in bad:
            print(result.error, file=sys.stderr)
        check(len(bad))

    def probes(self) -> None:
        encoder, extractor = load_encoder(self.final / "encoder", device="cpu")
        untrained = build_model(self.config, {"speech": TokenStore.open(self.tokens)}).spear
        models = {"pretrained": encoder, "random": untrained}
        write_json(
            self.probe,
            {
                "probe": self._word_probe(models, extractor),
                "linear_probe": self._instrument_probe(models, extractor),
            },
        )

    def _word_probe(self, models: dict[str, Any], extractor: SpearFeatureExtractor) -> dict[str, Any]:
        """ABX tests of words by a voice that was heard and one that was not."""
        sides = [
            {utterance.label: utterance for utterance in self.utterances(split, task=WORDS)}
            for split in ("probe_train", "probe_test")
        ]
        words = sorted(set(sides[0]) & set(sides[1]))
        clips = [[side[word] for word in words] for side in sides]
        languages = [word.split(":")[0] for word in words]
        print(f"{WORDS}: ABX tests of {len(words)} words by two voices in each language.")

        def result(frames: list[list[np.ndarray]]) -> ProbeResult:
            return match_recordings(*frames, words, languages, seed=self.config.seed)

        results: dict[str, ProbeResult] = {}
        per_layer: dict[str, list[dict]] = {}
        for name, model in models.items():
            states = [frame_states(model, extractor, side) for side in clips]  # (layers, frames, dim) each
            layers = [
                result([[item[layer] for item in side] for side in states]) for layer in range(len(states[0][0]))
            ]
            results[name], per_layer[name] = layers[-1], [layer.to_dict() for layer in layers]
        mels = [[log_mel_frames(extractor, utterance)[::2] for utterance in side] for side in clips]  # 50 Hz, as above
        results["log_mel"] = result(mels)
        return {
            "task": WORDS,
            "measure": "ABX accuracy across voices, by dynamic time warping; chance is 0.5",
            "classes": len(words),
            "train_utterances": len(words),
            "test_utterances": len(words),
            "test_split": "probe_test",
            "features": "frames of the last layer, standardised by voice",
            **compared(results),
            "nearest_is_the_word": {
                name: float((value.predictions == np.tile(words, 2)).mean()) for name, value in results.items()
            },
            "per_layer": per_layer,
        }

    def _instrument_probe(self, models: dict[str, Any], extractor: SpearFeatureExtractor) -> dict[str, Any]:
        """A linear classifier of the families of instruments, on notes of instruments that it was not trained on."""
        train, test = (self.utterances(split, task=INSTRUMENTS) for split in ("probe_train", "probe_test"))
        print(f"{INSTRUMENTS}: a linear probe with {len(train)} notes to train on, {len(test)} to test on.")
        labels = [utterance.label for utterance in train], [utterance.label for utterance in test]
        # Notes of one instrument stay on one side of the cross-validation: the test set has other instruments.
        instruments = [utterance.id.rsplit("-", 1)[0] for utterance in train]
        features = {
            name: tuple(concatenated(pooled_features(model, extractor, clips)) for clips in (train, test))
            for name, model in models.items()
        }
        features["log_mel"] = tuple(log_mel_features(extractor, clips)[0] for clips in (train, test))
        results = {
            name: linear_probe(train_x, labels[0], test_x, labels[1], groups=instruments, seed=self.config.seed)
            for name, (train_x, test_x) in features.items()
        }
        return {
            "task": INSTRUMENTS,
            "classes": len(set(labels[0])),
            "train_utterances": len(train),
            "test_utterances": len(test),
            "test_split": "probe_test",
            "features": "mean and standard deviation over time, all layers concatenated",
            **compared(results),
        }

    def write_plots(self) -> None:
        from spear_hf.evaluation import plots

        metrics = read_json_lines(self.pretraining / "metrics.jsonl")
        evaluation = read_json_lines(self.pretraining / "evaluation.jsonl")
        probe = json.loads(self.probe.read_text(encoding="utf-8"))["probe"]
        per_layer = {"pre-trained": probe["per_layer"]["pretrained"], "random weights": probe["per_layer"]["random"]}
        title = "ABX accuracy of words across voices by layer, with 95 % intervals"
        for name, figure in (
            ("loss", plots.plot_losses(metrics, evaluation)),
            ("masked_accuracy", plots.plot_masked_accuracy(evaluation)),
            ("probe_layers", plots.plot_probe_layers(per_layer, {"log-mel": probe["log_mel"]}, title)),
            ("tokens", self._token_figure()),
        ):
            plots.save_figure(figure, self.plots / f"{name}.png")

    def _token_figure(self) -> Any:
        """A held-out clip, masked as in training, with its tokens and those the model predicts."""
        from spear_hf import SpearForPreTraining
        from spear_hf.data.audio import load_audio
        from spear_hf.data.masking import sample_masks
        from spear_hf.evaluation.plots import plot_tokens
        from spear_hf.mvq.alignment import align_labels

        model = SpearForPreTraining.from_pretrained(self.final).eval()
        extractor = load_encoder(self.final / "encoder", device="cpu")[1]
        clip = next(utterance for utterance in self.utterances("heldout") if utterance.domain == "speech")
        inputs = extractor(load_audio(clip.path)[: 16000 * 4], sampling_rate=16000, return_tensors="pt")
        features = inputs["input_features"][0]
        masked, bins = sample_masks(
            len(features), features.shape[1], self.config.masking, self.config.seed, 0, clip.id
        )
        with torch.inference_mode():
            states = model(
                **inputs,
                mask_time_indices=torch.from_numpy(masked)[None],
                mask_feature_indices=torch.from_numpy(bins)[None],
            ).last_hidden_state
            logits = model.prediction_heads["speech"](states[0])
        store = TokenStore.open(self.tokens)
        predicted = logits.unflatten(-1, (-1, store.codebook_size)).argmax(dim=-1).numpy()
        offset = self.config.targets["speech"].offset
        tokens = store[clip.id][offset : offset + len(predicted)]
        targets = align_labels(tokens, store.frame_rate, len(predicted), store.frame_rate)
        return plot_tokens(
            features.numpy(), targets, store.codebook_size, f"Held-out clip {clip.id}", predicted, masked
        )

    def write_report(self) -> None:
        last = read_json_lines(self.pretraining / "evaluation.jsonl")[-1]
        steps = read_json_lines(self.pretraining / "metrics.jsonl")
        probes = json.loads(self.probe.read_text(encoding="utf-8"))
        encoder, _ = load_encoder(self.final / "encoder", device="cpu")
        store = TokenStore.open(self.tokens)
        training, heldout = self.utterances(*TRAINING), self.utterances("heldout")
        stages = {name: self.record(name) for name in STAGES}
        report = {
            "format_version": 1,
            "masked_accuracy": last["speech_masked_accuracy"],
            "unigram_accuracy": last["speech_unigram_accuracy"],
            "unmasked_accuracy": last["speech_unmasked_accuracy"],
            "masked_loss": last["speech_masked_loss"],
            "unigram_loss": last["speech_unigram_loss"],
            **probes,
            "wall_seconds": round(self.earlier["seconds"] + time.time() - psutil.Process().create_time(), 1),
            "cpu_seconds": round(self.earlier["cpu_seconds"] + time.process_time(), 1),
            "peak_memory_mb": max(peak_memory_mb(), *(stage["peak_memory_mb"] for stage in stages.values())),
            "seed": self.config.seed,
            "settings": asdict(self.settings),
            "model": {
                "name": "SPEAR demo",
                "license": "apache-2.0",
                "encoder_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
                "hidden_size": encoder.config.hidden_size,
                "num_hidden_layers": encoder.config.num_hidden_layers,
                "num_mel_bins": encoder.config.num_mel_bins,
                "frame_rate": 16000 / encoder.config.inputs_to_logits_ratio,
            },
            "data": {
                "name": "spear_hf bundled audio",
                "training_split": self.config.data.split,
                "training_utterances": len(training),
                "training_hours": hours(training),
                "heldout_utterances": len(heldout),
                "heldout_hours": hours(heldout),
            },
            "tokens": {
                "teacher": store.teacher,
                "num_codebooks": store.num_codebooks,
                "codebook_size": store.codebook_size,
                "frame_rate": store.frame_rate,
                "quantizer_id": store.quantizer_id,
            },
            "training": {
                "config": self.settings.config,
                "steps": steps[-1]["step"],
                "epochs": steps[-1]["epoch"],
                "hours_seen": steps[-1]["hours"],
                "batch_seconds": self.config.data.batch_seconds,
                "optimizer": self.config.optimizer.name,
                "learning_rate": self.config.optimizer.learning_rate,
            },
            "stages": stages,
            "versions": versions(),
        }
        report["claims"] = claims(report)
        write_json(self.report, report)
        write_card(self.report, CARD_TEMPLATE, self.final)


STAGES: dict[str, Callable[[Demo], None]] = {
    "quantize": Demo.quantize,
    "tokenize": Demo.tokenize,
    "pretrain": Demo.pretrain,
    "embed": Demo.embed,
    "probe": Demo.probes,
    "plot": Demo.write_plots,
}


def claims(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the demo is to show, and whether it does."""
    masked, unigram = report["masked_accuracy"], report["unigram_accuracy"]
    gain = report["probe"]["pretrained_minus_random"]
    return [
        {
            "claim": f"tokens of masked frames are predicted at least {CLEARLY:g} times as well as by the unigram",
            "holds": masked >= CLEARLY * unigram,
            "shown_by": f"{masked:.3f} against {unigram:.3f}",
        },
        {
            "claim": "the probe gains on random weights, with the 95 % interval of the paired difference above 0",
            "holds": gain["low"] > 0,
            "shown_by": f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})",
        },
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Small things
# ---------------------------------------------------------------------------------------------------------------------


def show(command: str) -> None:
    """The command line that does what comes."""
    print(f"$ {command}", flush=True)


def shown(path: Path) -> str:
    """As the user would write it."""
    return os.path.relpath(path)


def check(code: int) -> None:
    """StageError unless the exit code is 0."""
    if code:
        raise StageError(f"exit code {code}")


def compared(results: dict[str, ProbeResult]) -> dict[str, Any]:
    """The results and the differences that matter, for JSON."""
    return {
        **{name: value.to_dict() for name, value in results.items()},
        "pretrained_minus_random": paired_difference(results["pretrained"], results["random"]).to_dict(),
        "pretrained_minus_log_mel": paired_difference(results["pretrained"], results["log_mel"]).to_dict(),
    }


def hours(utterances: list[Utterance]) -> float:
    return sum(utterance.num_samples or 0 for utterance in utterances) / 16000 / 3600


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB of 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def versions() -> dict[str, Any]:
    import sklearn
    import transformers

    return {
        "spear_hf": spear_hf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "scikit_learn": sklearn.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpus": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def table(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    probe, linear = report["probe"], report["linear_probe"]

    def interval(result: dict[str, float]) -> str:
        return "{accuracy:6.1%}  ({low:.1%} to {high:.1%})".format(**result)

    lines = [
        "held-out audio, tokens of masked frames",
        f"  predicted by the model      {report['masked_accuracy']:6.1%}",
        f"  unigram baseline            {report['unigram_accuracy']:6.1%}",
        f"ABX tests of {probe['classes']} spoken words across voices (chance: 50 %)",
        f"  pre-trained                 {interval(probe['pretrained'])}",
        f"  random weights              {interval(probe['random'])}",
        f"  log-mel                     {interval(probe['log_mel'])}",
        f"linear probe of {linear['task']}, {linear['classes']} classes",
        f"  pre-trained                 {interval(linear['pretrained'])}",
        f"  random weights              {interval(linear['random'])}",
        f"  log-mel                     {interval(linear['log_mel'])}",
        f"{report['wall_seconds'] / 60:.1f} minutes, {report['peak_memory_mb'] / 1000:.1f} GB of memory",
    ]
    lines += [
        f"{'holds' if claim['holds'] else 'FAILS'}: {claim['claim']}: {claim['shown_by']}"
        for claim in report["claims"]
    ]
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the results [%(default)s]")
    parser.add_argument("--force", action="store_true", help="delete what is in the folder and begin anew")
    parser.add_argument(
        "--smoke", action="store_true", help="a few clips and steps: tries the machinery, and learns nothing"
    )
    arguments = parser.parse_args(command_line)
    demo = Demo(arguments.output, SMOKE if arguments.smoke else FULL)
    try:
        demo.prepare(arguments.force)
        report = demo.run()
    except (KeyboardInterrupt, Interrupted) as error:
        print("\nInterrupted. The same command goes on where this stopped.", file=sys.stderr)
        return INTERRUPTED if isinstance(error, Interrupted) else 130
    except (StageError, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(report)}\nreport: {shown(demo.report)}   card: {shown(demo.final / 'README.md')}")
    if arguments.smoke:
        return 0
    return 0 if all(claim["holds"] for claim in report["claims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
