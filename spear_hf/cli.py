# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The `spear-hf` command. Every subcommand imports what it needs when it runs, so `spear-hf --help` stays quick."""

import sys
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    name="spear-hf",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)


# Options on --data of every command that takes a corpus; see spear_hf/data/sources.py.
DATA = typer.Option(help="Folder, manifest (.jsonl, .csv, .tsv), parquet or tar files, saved dataset, or Hub name.")
Data = Annotated[str, DATA]
Splits = Annotated[list[str] | None, typer.Option(help="Of the data; may be repeated. Default: all.")]
DataConfig = Annotated[str | None, typer.Option(help="Configuration of a dataset that has several.")]
DataRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a dataset of the Hub.")]
AudioColumn = Annotated[str | None, typer.Option(help="Of a dataset; of tar files, the suffix of the audio.")]
IdColumn = Annotated[str | None, typer.Option(help="Of a dataset; default: id, path, or FILE#ROW (#).")]
DomainColumn = Annotated[str | None, typer.Option(help="Of a dataset: speech or audio.")]
Domain = Annotated[str | None, typer.Option(help="speech or audio, of utterances that have none.")]
Cut = Annotated[str, typer.Option(help="Where longer audio is cut: silence, fixed, or none.")]
MaxSeconds = Annotated[float, typer.Option(help="Longer audio is cut.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        import torch
        import transformers

        from . import __version__

        typer.echo(f"spear_hf {__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Use, evaluate and pre-train SPEAR speech and audio encoders, and turn audio into tokens."""


@app.command()
def embed(
    audio: Annotated[
        list[Path], typer.Argument(help="Audio files of any common format and rate, folders, or manifests.")
    ],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a SPEAR model, or of another audio encoder.")],
    output: Annotated[Path, typer.Option(help="File to write: .safetensors, .npz or .parquet.")],
    layer: Annotated[str, typer.Option(help="last, a number (0: the stem), all, or mean (of all).")] = "last",
    pool: Annotated[str, typer.Option(help="Over frames: none, mean, or mean+std.")] = "none",
    batch_seconds: Annotated[
        float | None, typer.Option(help="Seconds of audio in a batch, padding included; 60 on the CPU, else 240.")
    ] = None,
    max_seconds: Annotated[float, typer.Option(help="Refuse longer files: time grows with length squared.")] = 120.0,
    window_seconds: Annotated[
        float | None, typer.Option(help="Encode longer files in windows of it, nearly equal, in linear time.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the computation: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Embed audio files: one array of frames x dimensions per file, named by its path.

    Bad files are skipped and listed, on stderr and in OUTPUT.errors.jsonl; the exit code is then 1.
    """
    from .evaluation.embedding import run_embedding

    settings = {"layer": layer, "pool": pool, "batch_seconds": batch_seconds, "max_seconds": max_seconds}
    settings["window_seconds"] = window_seconds
    raise typer.Exit(run_embedding(audio, output, model=model, device=device, dtype=dtype, **settings))


@app.command()
def evaluate(
    model: Annotated[list[str], typer.Option(help="Folder or Hub id of an audio encoder; may be repeated.")],
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE#KEY=VALUE,...",
            help="Manifest, folder, HEAR task folder or dataset of the Hub, and options; may be repeated. Keys: kind "
            "(classification, tagging, frames, events, asr, pr, verification, query), probe, train, valid, test, ...",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the report; a run that was stopped goes on there.")],
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Another encoder, teacher:SPEC or random:MODEL, side by side; may be repeated."),
    ] = None,
    default_baselines: Annotated[
        bool, typer.Option(help="Also log-mel, mfcc, and the model's architecture with random weights.")
    ] = True,
    feature: Annotated[
        list[str] | None, typer.Option(help="weighted, layers, last or all; may be repeated. Default: by the task.")
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            help="linear, mlp, or blstm (SUPERB's, for frames and texts); may be repeated. Default: the first 2."
        ),
    ] = None,
    grid: Annotated[str, typer.Option(help="Settings of trained heads to try: small, or full (HEAR's).")] = "small",
    pool: Annotated[str, typer.Option(help="Features of a clip: mean+std, or mean (SUPERB's, HEAR's).")] = "mean+std",
    seeds: Annotated[int, typer.Option(help="Runs of trained heads, averaged.")] = 1,
    seed: Annotated[int, typer.Option(help="Of heads, of random weights, and of the bootstrap.")] = 0,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap of the intervals.")] = 1000,
    card: Annotated[Path | None, typer.Option(help="README.md that gets the results, in text and metadata.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of embeddings; default: OUTPUT/cache.")] = None,
    batch_seconds: Annotated[float, typer.Option(help="Of audio that is embedded at once, padding included.")] = 30.0,
    max_seconds: Annotated[float, typer.Option(help="Refuse longer clips: time grows with length squared.")] = 120.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the encoders: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Evaluate frozen encoders on labelled audio, by the protocols of SUPERB and HEAR, against baselines.

    OUTPUT gets report.json, report.md and plots. Embeddings are kept on disk; results that are there are not redone.
    """
    from .evaluation.command import run_evaluation

    code = run_evaluation(
        model,
        tasks,
        output,
        card=card,
        default_baselines=default_baselines,
        baselines=baseline or (),
        device=device,
        dtype=dtype,
        cache=cache,
        batch_seconds=batch_seconds,
        max_seconds=max_seconds,
        features=tuple(feature) if feature else None,
        heads=tuple(head or ("linear", "mlp")),
        grid=grid,
        pool=pool,
        seeds=seeds,
        seed=seed,
        resamples=resamples,
    )
    raise typer.Exit(code)


@app.command()
def quantize(
    teacher: Annotated[str, typer.Option(help="kaldi-mfcc, module:factory, or folder or Hub id of an audio encoder.")],
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder of the quantiser, which must not hold one yet.")],
    codebooks: Annotated[
        int | None, typer.Option(help="Codes per frame; default: as published for a known teacher, else say it.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Hidden state of the teacher; default: as published, else the last.")
    ] = None,
    split: Splits = None,
    data_config: DataConfig = None,
    data_revision: DataRevision = None,
    audio_column: AudioColumn = None,
    id_column: IdColumn = None,
    domain_column: DomainColumn = None,
    domain: Domain = None,
    cut: Cut = "silence",
    max_seconds: MaxSeconds = 30.0,
    codebook_size: Annotated[int, typer.Option(help="Codes of each codebook.")] = 256,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Standardise every channel; default: as published, else yes."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of each of the two phases.")] = 35_000,
    batch_size: Annotated[int, typer.Option(help="Frames a training step.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="Of the first phase; the second starts at half.")] = 0.005,
    frames: Annotated[int, typer.Option(help="Frames sampled over the data to train on.")] = 200_000,
    heldout_frames: Annotated[int, typer.Option(help="Frames of held-out utterances for the report.")] = 10_000,
    max_hours: Annotated[float | None, typer.Option(help="Sample from so many hours, drawn by the seed.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sample and of training.")] = 0,
    window: Annotated[str | None, typer.Option(help="Whisper: pad (default) or slice, see hub_teacher.py.")] = None,
    window_seconds: Annotated[float | None, typer.Option(help="Longer audio goes in windows; default 30.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a teacher from the Hub.")] = None,
    teacher_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Argument of module:factory; may be repeated.")
    ] = None,
    batch_seconds: Annotated[float | None, typer.Option(help="Of audio in a batch; default 120, GPU 600.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the teacher: float32, bfloat16 or float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a quantiser in OUTPUT.")] = False,
) -> None:
    """Train a multi-codebook quantiser on a teacher's features of your audio: audio to tokens, in one folder.

    The paper's teachers need no settings: microsoft/wavlm-large (speech) and mispeech/dasheng-1.2B (audio).
    OUTPUT gets the quantiser, report.json (held-out error, use of the codebooks), metrics.jsonl and quantizer.png.
    """
    from .data.commands import DataOptions
    from .mvq.commands import run_quantize

    options = DataOptions(
        data,
        split or (),
        data_config,
        data_revision,
        audio_column,
        id_column,
        domain_column,
        domain,
        cut,
        max_seconds,
    )
    code = run_quantize(
        options,
        output,
        teacher,
        layer=layer,
        revision=revision,
        window=window,
        window_seconds=window_seconds,
        teacher_options=teacher_option or (),
        frames=frames,
        heldout_frames=heldout_frames,
        max_hours=max_hours,
        batch_seconds=batch_seconds,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        num_codebooks=codebooks,
        codebook_size=codebook_size,
        normalize=normalize,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    raise typer.Exit(code)


@app.command()
def tokenize(
    tokenizer: Annotated[str, typer.Option(help="Folder or Hub id of a quantiser, as `spear-hf quantize` writes it.")],
    output: Annotated[Path, typer.Option(help="Folder of the token store; an interrupted one is completed.")],
    data: Annotated[str | None, DATA] = None,
    split: Splits = None,
    data_config: DataConfig = None,
    data_revision: DataRevision = None,
    audio_column: AudioColumn = None,
    id_column: IdColumn = None,
    domain_column: DomainColumn = None,
    domain: Domain = None,
    cut: Cut = "silence",
    max_seconds: MaxSeconds = 30.0,
    teacher: Annotated[str | None, typer.Option(help="Where the teacher is now, if it has moved.")] = None,
    refine_iters: Annotated[int, typer.Option(help="Refinement passes of the codes.")] = 5,
    shard_utterances: Annotated[int, typer.Option(help="Utterances in a shard: what an interruption costs.")] = 1000,
    batch_seconds: Annotated[float | None, typer.Option(help="Of audio in a batch; default 120, GPU 600.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of the teacher; default: as the quantiser was trained.")] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="This is job I of N (0 <= I < N).")] = None,
    with_audio: Annotated[bool, typer.Option("--with-audio", help="Join the audio, losslessly.")] = False,
    preview: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only draw this file's tokens, to OUTPUT, a .png; no store.")
    ] = None,
    preview_start: Annotated[float, typer.Option(help="Seconds into FILE at which the picture starts.")] = 0.0,
    preview_seconds: Annotated[float, typer.Option(help="Seconds that it shows.")] = 10.0,
    preview_audio: Annotated[
        bool, typer.Option("--preview-audio", help="Write that excerpt of FILE, as it was, to a .wav beside OUTPUT.")
    ] = False,
) -> None:
    """Turn audio into tokens, in a token store: parquet shards that `datasets.load_dataset` reads.

    Any number of workers give the same bytes: jobs with --shard, in any order, the last of which completes the store,
    and ranks of `accelerate launch` or torchrun. Killed and run again, it goes on; times are in OUTPUT.metrics. Bad
    audio is skipped and listed, on stderr and in OUTPUT/quarantine.jsonl; the exit code is then 1.
    With --preview FILE, the spectrogram of FILE with its tokens under it instead. There is no vocoder: tokens cannot
    be played back.
    """
    from .data.commands import DataOptions
    from .mvq.commands import run_preview, run_tokenize

    if (data is None) == (preview is None):
        raise typer.BadParameter("say --data, to write a store, or --preview, to draw one file's tokens")
    if preview is not None:
        code = run_preview(
            preview,
            output,
            tokenizer,
            teacher=teacher,
            refine_iters=refine_iters,
            start=preview_start,
            seconds=preview_seconds,
            write_audio=preview_audio,
            device=device,
            dtype=dtype,
        )
        raise typer.Exit(code)
    assert data is not None
    options = DataOptions(
        data,
        split or (),
        data_config,
        data_revision,
        audio_column,
        id_column,
        domain_column,
        domain,
        cut,
        max_seconds,
    )
    code = run_tokenize(
        options,
        output,
        tokenizer,
        teacher=teacher,
        refine_iters=refine_iters,
        shard_utterances=shard_utterances,
        batch_seconds=batch_seconds,
        device=device,
        dtype=dtype,
        shard=shard,
        with_audio=with_audio,
    )
    raise typer.Exit(code)


@app.command("merge-tokens")
def merge_tokens(
    output: Annotated[Path, typer.Argument(help="Folder of the merged store; an interrupted one is completed.")],
    store: Annotated[
        list[str], typer.Option(metavar="NAME=STORE", help="A teacher's store, as in speech=DIR; give two or more.")
    ],
    intersect: Annotated[
        bool, typer.Option("--intersect", help="Take the utterances that all have, instead of refusing.")
    ] = False,
) -> None:
    """Merge the token stores of several teachers over the same audio into one, with columns NAME_codes."""
    from .mvq.commands import run_merge_tokens

    raise typer.Exit(run_merge_tokens(output, store, intersect=intersect))


@app.command()
def segment(
    data: Data,
    output: Annotated[Path, typer.Option(help="Manifest to write, .jsonl.")],
    split: Splits = None,
    domain: Domain = None,
    cut: Cut = "silence",
    max_seconds: MaxSeconds = 30.0,
    min_seconds: Annotated[float | None, typer.Option(help="No stretch is shorter; default 1.")] = None,
) -> None:
    """Cut the long audio of a list into stretches, as quantize and tokenize do: a manifest for training on them.

    Files are left as they are; rows say where in its file a stretch is. Bad audio is left out and listed; the exit
    code is then 1.
    """
    from .data.commands import DataOptions, run_segment

    options = DataOptions(data, split or (), domain=domain, cut=cut, max_seconds=max_seconds)
    raise typer.Exit(run_segment(options, output, min_seconds))


@app.command(context_settings={"allow_extra_args": True})
def pretrain(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="A shipped configuration (tiny, base-speech, ...) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE ...", help="Settings, as in: max_steps=100.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last complete checkpoint in output_dir.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print batches, parameters, memory and steps; train nothing.")] = False,
) -> None:
    """Pre-train an encoder by masked prediction of tokens.

    On several GPUs: `torchrun --nproc-per-node 8 -m spear_hf.cli pretrain ...`, or `accelerate launch` in place of
    torchrun; on several nodes with their options for that, and output_dir on a disk that all nodes share. Exit code 0:
    finished. 75: stopped by SIGTERM, SIGUSR1 or Ctrl-C after saving; --resume goes on. 1: an error, printed.
    """
    from .pretraining.command import run_pretraining

    # Of `--set a=1 b=2` the option takes a=1, and what follows arrives as extra arguments.
    raise typer.Exit(run_pretraining(config, [*(overrides or []), *context.args], resume=resume, dry_run=dry_run))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="Folders of `spear-hf pretrain` runs.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; of one run by default RUN/report, of several needed.")
    ] = None,
) -> None:
    """Draw what runs have recorded, one or several compared: report.md and report.png."""
    from .pretraining.command import run_report

    raise typer.Exit(run_report(runs, output))


@app.command()
def benchmark(
    against: Annotated[
        str, typer.Option(help="Encoders of transformers to compare with: wavlm, hubert or both.")
    ] = "",
    output: Annotated[Path | None, typer.Option(help="Table to write, .csv, with a chart beside it, .png.")] = None,
    measure: Annotated[
        str, typer.Option(help="encoder, features, lengths (of files to embed), training, or memory.")
    ] = "encoder",
    cases: Annotated[
        str | None, typer.Option(help="Utterances x seconds of each batch, such as 1x10,4x15; lengths: 64x2-30.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns of each encoder, of which the median counts.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Of torch; default: its own choice.")] = None,
) -> None:
    """Time the encoder on the CPU of this machine, features included, with random weights of the base size.

    Or its features, files of unlike lengths, a training step, or its memory. Its results are compared with those of a
    plain path first.
    """
    from .evaluation.speed_command import run_benchmark

    raise typer.Exit(run_benchmark(measure, against, output, cases, repeats, threads))


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id (published or ours), or an icefall checkpoint, .pt.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="Format to write: spear_hf or published.")] = "spear_hf",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEACHER",
            help="icefall: codebook_loss_net or codebook_loss_heads.N = speech, audio or drop; may be repeated. "
            "Default: codebook_loss_net=speech, codebook_loss_heads.0=speech, codebook_loss_heads.1=audio.",
        ),
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="icefall: attention heads, if of unusual size.")] = None,
    unmasked_dim: Annotated[int | None, typer.Option(help="icefall: encoder_unmasked_dim of the training.")] = None,
    activations: Annotated[Path | None, typer.Option(help="What the original computes, to compare with.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest error of these activations.")] = 1e-5,
    force: Annotated[bool, typer.Option(help="Replace an earlier conversion.")] = False,
) -> None:
    """Convert a published or icefall checkpoint to ours, or ours to the published format.

    What becomes of every tensor and a parity check are printed first; after a mismatch nothing is written.
    """
    from .conversion.command import run_conversion
    from .conversion.convert import convert as convert_checkpoint
    from .conversion.icefall import parse_heads

    def conversion() -> None:
        convert_checkpoint(
            source,
            output,
            to=to,
            revision=revision,
            heads=parse_heads(head or ()),
            num_heads=num_heads,
            unmasked_dim=unmasked_dim,
            activations=activations,
            tolerance=tolerance,
            force=force,
        )

    raise typer.Exit(run_conversion(conversion))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a SPEAR model, with a head or without.")],
    output: Annotated[Path, typer.Argument(help="File to write, .onnx; beyond 2 GB the weights go to .onnx.data.")],
    hidden_states: Annotated[bool, typer.Option("--hidden-states", help="Also those of all layers.")] = False,
    tolerance: Annotated[
        float, typer.Option(help="Largest error of an output, relative to its largest value.")
    ] = 1e-4,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an earlier file.")] = False,
) -> None:
    """Export a model to ONNX, for any batch size and length, and compare it under onnxruntime.

    Features go in as SpearFeatureExtractor makes them. After a mismatch nothing is written.
    """
    from .conversion.onnx_export import run_export

    raise typer.Exit(run_export(model, output, hidden_states, tolerance, revision, force))


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder, as save_pretrained writes it.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub, made if need be.")],
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the model code, for trust_remote_code=True without spear_hf.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to commit to; default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, send nothing.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Token of the Hub; HF_TOKEN or `hf auth login` keep it out of the history.")
    ] = None,
) -> None:
    """Check a model folder and publish it on the Hub, in one commit: weights, configurations, model card."""
    from .hub import PublishError
    from .hub import publish as publish_folder

    try:
        published = publish_folder(
            folder,
            repo_id,
            with_code=with_code,
            private=private,
            revision=revision,
            message=message,
            token=token,
            dry_run=dry_run,
        )
    except (FileNotFoundError, PublishError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for name, size in published.files.items():
        typer.echo(f"{size:>15,} {name}")
    if published.left_out:
        typer.echo(f"Not published: {', '.join(published.left_out)}")
    for note in published.notes:
        typer.echo(f"note: {note}", err=True)
    goal = f"{published.repo_id}, branch {published.revision}"
    typer.echo(f"Published: {published.url}" if published.commit else f"Checked, nothing sent (to {goal}).")


def main() -> None:
    """Entry point of the `spear-hf` console script."""
    try:
        app()
    except ModuleNotFoundError as error:
        sys.exit(
            f"spear-hf: the package {error.name} is not installed. In a clone of spear_hf, `pip install .` brings all "
            "that is needed, and `pip install '.[onnx]'` what export needs."
        )
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        sys.exit(130)  # as shells have it: 128 and the number of SIGINT


if __name__ == "__main__":
    main()
