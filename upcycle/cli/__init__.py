"""The command line: one thin file a command, which parses, calls and prints. Heavy imports happen inside commands."""

import os
import signal
import sys
import traceback

import typer

from upcycle.cli import (
    bench,
    calibrate,
    compare,
    convert,
    demo,
    encode,
    evaluate,
    export,
    finetune,
    info,
    inspect,
    push_to_hub,
    recipes,
    sample,
    synthesize,
)
from upcycle.errors import UpcycleError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a pretrained Diffusion Transformer into one that spends its compute where the picture needs it.",
    epilog="Every command takes [bold]--debug[/bold], which shows the traceback of an error.",
)
app.command("demo", epilog=demo.EPILOG)(demo.demo)
app.command("convert", epilog=convert.EPILOG)(convert.convert)
app.command("encode", epilog=encode.EPILOG)(encode.encode)
app.command("synthesize", epilog=synthesize.EPILOG)(synthesize.synthesize)
app.command("finetune", epilog=finetune.EPILOG)(finetune.finetune)
app.add_typer(recipes.app, name="recipes")
app.command("sample", epilog=sample.EPILOG)(sample.sample)
app.command("inspect", epilog=inspect.EPILOG)(inspect.inspect)
app.command("calibrate", epilog=calibrate.EPILOG)(calibrate.calibrate)
app.command("compare", epilog=compare.EPILOG)(compare.compare)
app.command("bench", epilog=bench.EPILOG)(bench.bench)
app.command("evaluate", epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command("info", epilog=info.EPILOG)(info.info)
app.command("push-to-hub", epilog=push_to_hub.EPILOG)(push_to_hub.push_to_hub)
app.command("export", epilog=export.EPILOG)(export.export)


@app.callback(invoke_without_command=True)
def _top(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from upcycle import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the user can mend it, 1 ours, 130 interrupted."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that what is half-written is removed
    try:
        code = app(args=arguments, standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # how typer reports a KeyboardInterrupt
            _fail("interrupted", 130, False)
    except UpcycleError as error:
        code = _fail(str(error), 2, debug)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", 130, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command-line parser
            message = error.format_message()  # none for `upcycle` alone, which has printed the help
            code = _fail(f"{message}; see --help", 2, debug) if message else 2
        else:
            what = f"{type(error).__name__}: {error}"
            code = _fail(f"this is a fault of upcycle, not yours ({what}); run again with --debug", 1, debug)
    sys.exit(code)


def _fail(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("error: " + " ".join(line.split()), file=sys.stderr)
    return code
