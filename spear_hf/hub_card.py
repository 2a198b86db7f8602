# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The model card of a folder that has none: what the model is, and what the run that made it recorded.

The only figures are those of the configuration, of the weights, of the records of `spear-hf pretrain` where the folder
is the final model of such a run, and of `spear-hf evaluate` where its report lies there. They go through
`evaluation.card` and `evaluation.report`, which refuse a figure that is not there.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from . import __version__
from .hub_staging import CARD, MODEL_CLASSES
from .modeling_spear import SpearPreTrainedModel


# Categories of the Hub; other classes have none of their own.
_PIPELINE_TAGS = {
    "SpearForCTC": "automatic-speech-recognition",
    "SpearForSequenceClassification": "audio-classification",
    "SpearModel": "feature-extraction",
}

_MODEL = """# {{model.name}}

A [SPEAR](https://arxiv.org/abs/2510.25955) encoder for speech and audio.

| | |
|---|---|
| Class | `{{model.class_name}}` |
| Parameters | {{model.parameters|count}} |
| Hidden size, layers | {{model.hidden_size}}, {{model.num_hidden_layers}} |
| Input | mono audio at 16 kHz, as {{model.num_mel_bins}} log-mel bins at 100 Hz |
| Output | {{model.frame_rate}} frames a second |

## Usage

Needs {{usage.needs}}.

```python
import numpy as np
import torch
{{usage.imports}}from transformers import AutoFeatureExtractor, {{usage.auto_class}}

extractor = AutoFeatureExtractor.from_pretrained("{{model.repo_id}}"{{usage.trust}})
model = {{usage.auto_class}}.from_pretrained("{{model.repo_id}}"{{usage.trust}})
audio = np.zeros(16000, dtype=np.float32)  # a second, mono, 16 kHz
with torch.no_grad():
    outputs = model(**extractor(audio, sampling_rate=16000, return_tensors="pt"))
print(outputs.{{usage.output}}.shape)
```
"""

_TRAINING = """
## Training

| | |
|---|---|
| Steps | {{run.steps|count}} |
| Audio heard, repetitions included | {{run.hours|fixed2}} hours |
| Optimiser | {{run.optimizer}}, learning rate {{run.learning_rate|number}} |
| Seed | {{run.seed}} |
| Published with | spear_hf {{versions.spear_hf}} |
"""

_MEASURED = """
## Measured

Everything in this section was recorded by the training run itself, after {{held_out.step|count}} steps, on audio that
was held out of it: how often the model predicts the tokens of masked frames, with {{held_out.weights}}.

| tokens | this model | always the most frequent token (unigram) |
|---|---|---|
"""
_MEASURED_ROW = "| %s | {{held_out.%s_masked_accuracy|percent}} | {{held_out.%s_unigram_accuracy|percent}} |\n"

_LIMITS = """
## Limits

The publisher has not stated which audio the model was trained on, nor what it may be used for. Nothing but what stands
above was measured for this card.
"""


# In a card that a run wrote for itself: publishing writes it anew, with the repository's name.
GENERATED = (
    "<!-- Written by spear-hf pretrain; spear-hf publish writes it anew. Remove this line to keep your edits. -->"
)


def write_run_card(folder: Path, final: Path, model: SpearPreTrainedModel) -> None:
    """The card of a finished run in `folder`, which is to become its folder `final`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", final.resolve().parent.name).strip("-.") or "spear"
    write_card(folder, final, model, f"OWNER/{name}", with_code=False)
    card = folder / CARD
    card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{GENERATED}\n", encoding="utf-8")


def is_generated(card: Path) -> bool:
    """Whether the card is one that `write_run_card` wrote."""
    return GENERATED in card.read_text(encoding="utf-8")


def write_card(staged: Path, source: Path, model: SpearPreTrainedModel, repo_id: str, with_code: bool) -> None:
    """Writes README.md into the staged folder, and plots where `source` is the final model of a run.

    Metadata of a card that is there, such as a licence that was added, stays. With an evaluation.json in `source`, a
    report of `spear-hf evaluate` on this very model, it states that too; ValueError if the report is another model's.
    """
    from .evaluation.card import REPORT_NAME, fill_template

    report = _describe(model, repo_id, with_code)
    template = _MODEL
    if run := run_of(source):
        template += _TRAINING + _measured(staged, run, report)
    name = type(model).__name__
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": _PIPELINE_TAGS.get(name)}
    metadata |= {"tags": ["spear", "speech", "audio"], **_metadata(staged / CARD)}
    content = f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{fill_template(template + _LIMITS, report)}"
    (staged / CARD).write_text(content, encoding="utf-8")
    if (source / REPORT_NAME).is_file():
        from .evaluation.report import add_to_card, name_of, read_report  # brings all that evaluation needs

        evaluated = read_report(source / REPORT_NAME)
        add_to_card(staged / CARD, evaluated, name_of(evaluated, model))


def _metadata(card: Path) -> dict[str, Any]:
    """That of a card, if there is one, but for results, which are filled in from a report."""
    values = ModelCard.load(card).data.to_dict() if card.is_file() else {}
    return {name: value for name, value in values.items() if name != "model-index"}


def _describe(model: SpearPreTrainedModel, repo_id: str, with_code: bool) -> dict[str, Any]:
    config = model.config
    auto_class = next(auto for auto, cls in MODEL_CLASSES.items() if cls is type(model))
    if auto_class == "AutoModelForPreTraining":
        auto_class = "AutoModel"  # what a pre-trained model is loaded as
    needs = "transformers and torch" if with_code else "the package spear_hf, which registers the model when imported"
    return {
        "model": {
            "name": repo_id.split("/")[1],
            "repo_id": repo_id,
            "class_name": type(model).__name__,
            "parameters": sum(value.numel() for value in model.parameters()),
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_mel_bins": config.num_mel_bins,
            "frame_rate": 50 // config.output_downsampling_factor,
        },
        "usage": {
            "needs": needs,
            "imports": "" if with_code else "import spear_hf\n",
            "trust": ", trust_remote_code=True" if with_code else "",
            "auto_class": auto_class,
            "output": "last_hidden_state" if auto_class == "AutoModel" else "logits",
        },
        "versions": {"spear_hf": __version__},
    }


def run_of(source: Path) -> Path | None:
    """The folder of the `spear-hf pretrain` run whose final model, or the encoder in it, is `source`."""
    from .pretraining.run_folder import RunFolder

    folder = source.resolve()
    final = folder.parent if folder.name == "encoder" else folder
    run = RunFolder(final.parent)
    return run.path if final == run.final and run.config.is_file() and run.metrics.is_file() else None


def _measured(staged: Path, path: Path, report: dict[str, Any]) -> str:
    """Adds the run's records to the report; returns the part of the template that states them, its plots drawn."""
    from .evaluation import plots
    from .pretraining.metrics import read_json_lines
    from .pretraining.run_folder import RunFolder

    run = RunFolder(path)
    settings = run.read_config()
    metrics, evaluation = read_json_lines(run.metrics), read_json_lines(run.evaluation)
    last = metrics[-1] if metrics else {}
    report["run"] = {
        "steps": last.get("step"),
        "hours": last.get("hours"),
        "optimizer": settings["optimizer"]["name"],
        "learning_rate": settings["optimizer"]["learning_rate"],
        "seed": settings["seed"],
    }
    if not metrics or not evaluation:
        return ""
    averaged = read_json_lines(run.averaged)
    weights = f"the published weights, a mean over {averaged[-1]['samples']} steps" if averaged else "the last weights"
    report["held_out"] = {**(averaged or evaluation)[-1], "weights": weights}
    teachers = [name for name in settings["targets"] if evaluation[-1].get(f"{name}_masked_accuracy") is not None]
    if not teachers:
        return ""
    rows = "".join(_MEASURED_ROW % (name, name, name) for name in teachers)
    images = ""
    for name in teachers:
        for kind, figure in (
            ("loss", plots.plot_losses(metrics, evaluation, name)),
            ("accuracy", plots.plot_masked_accuracy(evaluation, name)),
        ):
            plots.save_figure(figure, staged / "plots" / f"{name}_{kind}.png")
            images += f"\n![{kind.capitalize()} of the {name} tokens](plots/{name}_{kind}.png)\n"
    return _MEASURED + rows + images
