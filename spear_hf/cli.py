"""The `spear-hf` command. Every subcommand imports what it needs when it runs, so `spear-hf --help` stays quick."""

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


def main() -> None:
    """Entry point of the `spear-hf` console script."""
    app()


if __name__ == "__main__":
    main()
