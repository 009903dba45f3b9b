"""`upcycle push-to-hub`: share an export, with a model card."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle push-to-hub\n
  upcycle push-to-hub runs/xl4/export you/DiT-XL-2-dc4 --private\n
  upcycle push-to-hub runs/xl4/export --measure --dry-run\n
  upcycle push-to-hub runs/xl4/export lab/model --create-pr --accept-license --yes\n
\n
Files that are there already are skipped, and the same command again goes on where an upload was interrupted. What you
change in the card on the Hub stays as you wrote it.\n
"""


def push_to_hub(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="An export. Default: the newest one below the current folder."),
    ] = None,
    repo: Annotated[
        str | None, typer.Argument(metavar="[REPO]", help="owner/name. Default: you, and the folder's or run's name.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    branch: Annotated[
        str | None, typer.Option("--branch", "--revision", help="Commit to this branch; made where it is missing.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Share under a base licence with restrictions, such as CC-BY-NC.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the export's own code where it is not this version's."),
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="First draw samples and router maps into the export, and time them.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Where to --measure: cpu, cuda ... Default: cuda if any.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files, sizes and the card; send nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Check an export, write its model card, and send both to the Hugging Face Hub as one commit."""
    if branch and create_pr:
        raise UpcycleError("--branch and --create-pr exclude each other: a pull request has a branch of its own")

    from upcycle.cli.show import print_json, quiet_libraries, stderr, stdout, working

    quiet_libraries()
    with working("loading"):
        from huggingface_hub.utils import disable_progress_bars

        from upcycle.graft.patches import adapter_folder
        from upcycle.hub import licence, push
        from upcycle.hub.check import check_export, open_export

    chosen = folder or push.find_export(Path.cwd())
    user, unknown = None, None
    with working("asking the Hub who you are"):
        try:
            user = push.identify()
        except UpcycleError as error:
            if not dry_run:
                raise
            unknown = f"your rights were not checked ({error})"
    repo_id = repo or f"{user['name'] if user else 'you'}/{push.default_name(chosen)}"
    stderr.print(f"{chosen} -> {repo_id}" + (f", branch {branch}" if branch else ""))
    push.check_name(repo_id)
    source = open_export(chosen)
    if not dry_run:
        licence.check_licence(source.licence, accepted=accept_license)
    if measure:
        if adapter_folder(chosen):
            raise UpcycleError("--measure is for dynamic chunking; upcycle calibrate measures an adapter")
        _measure(chosen, device)
    with working(f"checking {chosen}: hashes, shapes, a forward pass in stock diffusers"):
        export = check_export(chosen, trust_remote_code=trust_remote_code)
    with working(f"looking at {repo_id}"):
        asked: dict[str, Any] = {"branch": branch, "create_pr": create_pr, "private": private}
        try:
            if not user and not repo:
                raise UpcycleError("it is not known who you are")
            planned = push.plan_push(export, repo_id, user, **asked)
        except UpcycleError as error:
            if user:
                raise
            planned = push.plan_unseen(export, repo_id, **asked)
            export.notes.append(f"what is there was not looked at ({error})")
        if unknown:
            export.notes.append(unknown)
    if dry_run:
        _show_plan(planned, user, as_json)
        return
    for note in export.notes:
        stderr.print(f"note: {note}")
    if planned.kept:
        stderr.print(f"note: edited on the Hub and kept: {', '.join(planned.kept)}")
    _confirm(planned, yes)
    if as_json:
        disable_progress_bars()
    try:
        url = push.push(planned, on_step=stderr.print)
    finally:
        _end_bars()
    if as_json:
        print_json({**_facts(planned), "url": url, "committed": planned.parent is None or planned.parent not in url})
        return
    stdout.print(url, style="bold")


def _measure(folder: Path, device: str | None) -> None:
    from upcycle.cli.device import to_device
    from upcycle.cli.show import progress
    from upcycle.hub.measure import FORWARDS, measure
    from upcycle.sampling.pipeline import load_pipeline

    pipe = to_device(load_pipeline(str(folder)), device)
    with progress() as bar:
        task = bar.add_task("sampling for the card", total=FORWARDS)
        measure(folder, pipe, step=lambda: bar.advance(task))


def _end_bars() -> None:
    """End the lines of bars that an upload left open, or an error would be said behind one of them."""
    from huggingface_hub.utils import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def _facts(planned: Any) -> dict[str, Any]:
    return {
        "export": str(planned.export.folder),
        "repo": planned.repo_id,
        "branch": planned.branch,
        "create_pr": planned.create_pr,
        "new": planned.new,
        "licence": planned.export.source.licence,
        "files": {**planned.export.files, "README.md": len(planned.card.encode())},
        "delete": planned.delete,
        "bytes": planned.bytes,
        "kept_edits": planned.kept,
        "notes": planned.export.notes,
    }


def _show_plan(planned: Any, user: dict[str, Any] | None, as_json: bool) -> None:
    from upcycle.cli.show import print_json, size, stdout
    from upcycle.hub.licence import check_licence

    refused = None
    try:
        check_licence(planned.export.source.licence, accepted=False)
    except UpcycleError as error:
        refused = str(error)
    if as_json:
        print_json({**_facts(planned), "card": planned.card, "logged_in": user is not None, "refused": refused})
        return
    from rich.table import Table

    table = Table("file", "size")
    for name, count in _facts(planned)["files"].items():
        table.add_row(name, size(count))
    for name in planned.delete:
        table.add_row(name, "deleted there")
    stdout.print(table, soft_wrap=False)
    where = "a new repository" if planned.new else "a repository that is there already"
    stdout.print(f"{planned.repo_id}: {where}; {size(planned.bytes)}")
    for note in planned.export.notes:
        stdout.print(f"note: {note}")
    if refused:
        stdout.print(f"note: without --accept-license it would stop here: {refused}")
    if planned.kept:
        stdout.print(f"note: edited on the Hub and kept: {', '.join(planned.kept)}")
    stdout.print("\nREADME.md:\n")
    stdout.print(planned.card)


def _confirm(planned: Any, yes: bool) -> None:
    from upcycle.cli.show import size, stderr

    what = "a new private repository" if planned.private and planned.new else "a new public repository"
    where = what if planned.new else "a pull request" if planned.create_pr else "the repository that is there"
    stderr.print(f"{len(planned.export.files) + 1} files, {size(planned.bytes)}, to {planned.repo_id} ({where})")
    if yes:
        return
    if not sys.stdin.isatty():
        raise UpcycleError("nothing was sent: there is nobody to ask; pass --yes to push from a script")
    typer.confirm("Send them?", abort=True, err=True)
