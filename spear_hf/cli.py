"""The `spear-hf` command. Every subcommand imports what it needs when it runs, so `spear-hf --help` stays quick."""

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


def main() -> None:
    """Entry point of the `spear-hf` console script."""
    app()


if __name__ == "__main__":
    main()
