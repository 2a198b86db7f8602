# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The `spear-hf` command. Every subcommand imports what it needs when it runs, so `spear-hf --help` stays quick."""

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    name="spear-hf",
    help="Use, tokenise, pre-train and evaluate SPEAR speech and audio encoders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _root() -> None:
    """Keeps `spear-hf COMMAND` a group, whatever the number of commands."""


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

    On several GPUs: `accelerate launch -m spear_hf.cli pretrain ...`. Exit code 0: finished. 75: stopped by SIGTERM,
    SIGUSR1 or Ctrl-C after saving; --resume goes on. 1: an error, printed.
    """
    from .pretraining.command import run_pretraining

    # Of `--set a=1 b=2` the option takes a=1, and what follows arrives as extra arguments.
    raise typer.Exit(run_pretraining(config, [*(overrides or []), *context.args], resume=resume, dry_run=dry_run))


@app.command()
def embed(
    audio: Annotated[
        list[Path], typer.Argument(help="Audio files of any common format and rate, folders, or manifests.")
    ],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a SPEAR model, or of another audio encoder.")],
    output: Annotated[Path, typer.Option(help="File to write: .safetensors, .npz or .parquet.")],
    layer: Annotated[str, typer.Option(help="last, a number (0: the stem), all, or mean (of all).")] = "last",
    pool: Annotated[str, typer.Option(help="Over frames: none, mean, or mean+std.")] = "none",
    batch_seconds: Annotated[float, typer.Option(help="Seconds of audio in a batch, padding included.")] = 120.0,
    max_seconds: Annotated[float, typer.Option(help="Refuse longer files: memory grows with length squared.")] = 120.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the computation: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Embed audio files: one array of frames x dimensions per file, named by its path.

    Bad files are skipped and listed, on stderr and in OUTPUT.errors.jsonl; the exit code is then 1.
    """
    from .evaluation.embedding import run_embedding

    settings = {"layer": layer, "pool": pool, "batch_seconds": batch_seconds, "max_seconds": max_seconds}
    raise typer.Exit(run_embedding(audio, output, model=model, device=device, dtype=dtype, **settings))


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder, as save_pretrained writes it.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub, made if need be.")],
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the model code, for trust_remote_code=True without spear_hf.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to commit to [main].")] = None,
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
    app()


if __name__ == "__main__":
    main()
