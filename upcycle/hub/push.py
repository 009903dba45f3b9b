"""Send an export to the Hub as one commit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.hub.card import Card, edited_parts, make_card, render
from upcycle.hub.check import Export
from upcycle.sources.hub import causes, explain

CARD = "README.md"
# Folders whose names say nothing about the model in them.
_ANONYMOUS = ("export", "pipeline", "start", "best", "transformer")


@dataclass(frozen=True)
class Push:
    """What will be sent, and where to.

    ``card``: the text of README.md. ``kept``: parts of it that somebody edited. ``delete``: files of an earlier push
    that this export does not have.
    """

    export: Export
    repo_id: str
    branch: str | None
    create_pr: bool
    private: bool
    new: bool
    card: str
    kept: list[str] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of all files, the card included."""
        return sum(self.export.files.values()) + len(self.card.encode())


def find_export(folder: Path) -> Path:
    """The newest export in ``folder`` or up to four levels below; raises `UpcycleError` where there is none."""
    found = [
        path.parent
        for depth in range(5)
        for path in folder.glob("*/" * depth + provenance.FILE)
        if (path.parent / "transformer" / "config.json").is_file()
    ]
    if not found:
        raise UpcycleError(f"no export in {folder.resolve()} or below; give the folder that convert or finetune made")
    return max(found, key=lambda path: (path / provenance.FILE).stat().st_mtime)


def default_name(export: Path) -> str:
    """The repository's name: the folder's, or that of the run around ``runs/xl4/export``."""
    path = export.resolve()
    name = path.parent.name if path.name in _ANONYMOUS else path.name
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name).strip("-._")
    return kept[:90] or "upcycled"


def identify() -> dict[str, Any]:
    """Who is logged in: ``name``, and the ``orgs`` that the token may write to.

    Raises:
        UpcycleError: nobody, a token that is not valid or may only read, or the Hub cannot be reached.
    """
    if get_token() is None:
        raise UpcycleError(
            "not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token with write rights"
        )
    with _explained("your account"):
        try:
            user = HfApi().whoami()
        except HfHubHTTPError as error:
            if error.response.status_code == 401:
                raise UpcycleError("the Hub does not know your token; run `hf auth login` again") from error
            raise
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UpcycleError("your token may only read; make one with write rights and run `hf auth login` again")
    return user


def plan_push(
    export: Export,
    repo_id: str,
    user: dict[str, Any] | None,
    *,
    branch: str | None = None,
    create_pr: bool = False,
    private: bool = False,
) -> Push:
    """Find out what is at ``repo_id`` and what will be sent; nothing is changed there.

    ``user``: of `identify`; None for a dry run without login, which looks at public repositories only.

    Raises:
        UpcycleError: a name that cannot be, no right to write, a repository that is public where ``private`` is
            asked for, a pull request or branch of a repository that does not exist.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UpcycleError(
            f"{repo_id} is no name on the Hub; write it as owner/name, of letters, digits, - _ ."
        ) from None
    if "/" not in repo_id:
        raise UpcycleError(f"{repo_id} is no name on the Hub; write it as owner/name")
    there = _look(repo_id)
    if there is None:
        if create_pr:
            raise UpcycleError(
                f"{repo_id} does not exist (or you may not see it), so it takes no pull request; push to it first"
            )
        if user is not None:
            _check_namespace(repo_id.split("/")[0], user)
        return _planned(export, repo_id, branch, create_pr, private, new=True, existing=None, before=None)
    if private and not there.private:
        raise UpcycleError(
            f"{repo_id} exists and is public; make it private in its settings first, or leave out --private"
        )
    if user is not None and not create_pr:
        with _explained(repo_id):
            try:
                HfApi().auth_check(repo_id, write=True)
            except HfHubHTTPError as error:
                if error.response.status_code in (401, 403, 404):
                    raise UpcycleError(
                        f"{repo_id}: you have no right to write there; choose another repository, or --create-pr"
                    ) from error
                raise
    existing, before = (_read(repo_id, branch, name) for name in (CARD, provenance.FILE))
    return _planned(export, repo_id, branch, create_pr, private, new=False, existing=existing, before=before)


def plan_unseen(export: Export, repo_id: str, *, branch: str | None, create_pr: bool, private: bool) -> Push:
    """As `plan_push`, without asking the Hub: as if there were nothing yet."""
    return _planned(export, repo_id, branch, create_pr, private, new=True, existing=None, before=None)


def _planned(
    export: Export,
    repo_id: str,
    branch: str | None,
    create_pr: bool,
    private: bool,
    *,
    new: bool,
    existing: str | None,
    before: str | None,
) -> Push:
    local = export.folder / CARD
    if existing is None and local.is_file():
        existing = local.read_text()
    card: Card = make_card(export, repo_id)
    delete: list[str] = []
    if before is not None:
        with suppress(ValueError):  # not ours: nothing of it is touched
            delete = sorted(set(provenance.parse(before)["files"]) - set(export.files))
    kept = edited_parts(card, existing) if existing else []
    return Push(export, repo_id, branch, create_pr, private, new, render(card, existing), kept, delete)


def _look(repo_id: str) -> Any:
    with _explained(repo_id):
        try:
            return HfApi().model_info(repo_id)
        except RepositoryNotFoundError:
            return None


def _read(repo_id: str, branch: str | None, name: str) -> str | None:
    """A small text file of the repository; None where it, or the branch, does not exist."""
    with _explained(repo_id):
        for revision in (branch, None) if branch else (None,):
            try:
                return Path(hf_hub_download(repo_id, name, revision=revision)).read_text()
            except RevisionNotFoundError:
                continue  # a new branch starts from main
            except EntryNotFoundError:
                return None
    return None


def _check_namespace(owner: str, user: dict[str, Any]) -> None:
    orgs = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
    if owner != user["name"] and owner not in orgs:
        raise UpcycleError(
            f"{owner} is neither you ({user['name']}) nor an organisation of yours; choose another owner"
        )
    if orgs.get(owner) == "read":
        raise UpcycleError(f"you may only read in {owner}; ask its owners for write rights, or choose another owner")


def push(planned: Push, *, on_step: Callable[[str], None] = lambda what: None) -> str:
    """Create what is missing and commit everything at once; returns the URL of the commit or pull request.

    What an interrupted push has uploaded is skipped by the next one; readers see the old files until the commit is
    made.

    Raises:
        UpcycleError: the Hub refuses or cannot be reached; the line says what state the repository is in.
    """
    api, repo = HfApi(), planned.repo_id
    undone = f"nothing was committed to {repo}; run the command again, it skips what is uploaded already"
    if planned.new:
        on_step(f"creating {repo}")
        with _explained(repo, undone):
            api.create_repo(repo, private=planned.private or None, exist_ok=True)
    if planned.branch and not planned.create_pr:
        on_step(f"creating the branch {planned.branch}")
        with _explained(repo, undone):
            api.create_branch(repo, branch=planned.branch, exist_ok=True)
    files = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=planned.export.folder / name)
        for name in planned.export.files
    ]
    card = CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=planned.card.encode())
    gone = [CommitOperationDelete(path_in_repo=name) for name in planned.delete]
    before = _head(repo, planned.branch)
    on_step(f"uploading to {repo}")
    with _explained(repo, undone):
        try:
            done = api.create_commit(
                repo,
                [*files, card, *gone],
                commit_message="Upload a model made by upcycle",
                revision=planned.branch,
                create_pr=planned.create_pr,
            )
        except Exception as error:
            if planned.create_pr or not _disconnected(error):
                raise
            # The connection may have broken after the commit was made.
            now = _head(repo, planned.branch)
            if now == before:
                raise
            return f"{constants.ENDPOINT}/{repo}/commit/{now}"
    return done.pr_url or done.commit_url


def _head(repo_id: str, branch: str | None) -> str | None:
    with _explained(repo_id, "it is not known whether it was committed; run the command again"):
        return HfApi().model_info(repo_id, revision=branch).sha


@contextmanager
def _explained(spec: str, state: str | None = None) -> Iterator[None]:
    """Turn errors of the Hub into one line, with ``state`` after it."""
    try:
        yield
    except UpcycleError:
        raise
    except Exception as error:
        line = _line(spec, error)
        if line is None:
            raise
        raise UpcycleError(f"{line}; {state}" if state else line) from error


def _line(spec: str, error: Exception) -> str | None:
    """What a user can do about an error of the Hub; None where that is nothing.

    Made here and not copied from the error, whose text may quote request headers.
    """
    if isinstance(error, ValueError) and "README" in str(error):
        return f"{spec}: the Hub refuses the metadata of the model card; mend what was edited at the top of README.md"
    for cause in causes(error):
        if isinstance(cause, BadRequestError):
            said = " ".join((cause.server_message or "").split())[:200]
            return f"{spec}: the Hub refuses the request ({said or 'it does not say why'})"
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status in (401, 403):
                return f"{spec}: the Hub denies it ({status}); check the name, and that your token may write there"
            if status == 429:
                return f"{spec}: the Hub asks for a pause (429, too many requests); wait some minutes"
            if status in (409, 412):
                return f"{spec}: somebody else changed it meanwhile ({status})"
            return f"{spec}: the Hub answers with an error ({status}); try again later"
    if _disconnected(error):
        return f"{spec}: the connection to {constants.ENDPOINT} failed"
    mended = explain(spec, None, error)
    return None if mended is None else str(mended)


def _disconnected(error: Exception) -> bool:
    # Transport errors come from the HTTP library in use, which the hub library has changed before.
    return any(
        isinstance(cause, ConnectionError | TimeoutError)
        or (type(cause).__module__.startswith("httpx") and not hasattr(cause, "response"))
        for cause in causes(error)
    )
