"""Send an export to the Hub as one commit."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.graft.patches import adapter_folder
from upcycle.hub.card import Card, edited_parts, make_card, render, resets_licence
from upcycle.hub.check import Export
from upcycle.sources.hub import causes, explain

CARD = "README.md"
# Folders whose names say nothing about the model in them.
_ANONYMOUS = ("export", "pipeline", "start", "best", "transformer")


@dataclass(frozen=True)
class Push:
    """What will be sent, and where to.

    ``card``: the text of README.md. ``kept``: parts of it that somebody edited. ``delete``: files of an earlier push
    that this export does not have. ``parent``: the commit that was looked at; what was committed after it is not
    overwritten.
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
    parent: str | None = None

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
        if ((path.parent / "transformer" / "config.json").is_file() or adapter_folder(path.parent))
        # Half-written exports, and caches of the Hub, lie in hidden folders.
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise UpcycleError(f"no export in {folder.resolve()} or below; give the folder that convert or finetune made")
    return max(found, key=lambda path: (path / provenance.FILE).stat().st_mtime)


_RENEW = "run `hf auth login` again, or change HF_TOKEN where that is set, which comes first"


def default_name(export: Path) -> str:
    """The repository's name: the folder's, or that of the run around ``runs/xl4/export``."""
    path = export.resolve()
    name = path.parent.name if path.name in _ANONYMOUS else path.name
    kept = re.sub(r"[^\w.]+|-{2,}", "-", name, flags=re.ASCII)
    kept = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", kept)).removesuffix(".git")
    return kept.strip("-._")[:90].strip("-._") or "upcycled"


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
                raise UpcycleError(f"the Hub does not know your token; {_RENEW}") from error
            raise
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UpcycleError(f"your token may only read; make one with write rights, and {_RENEW}")
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
    check_name(repo_id)
    there = _look(repo_id)
    if there is None:
        if create_pr:
            raise UpcycleError(
                f"{repo_id} does not exist (or you may not see it), so it takes no pull request; push to it first"
            )
        if user is not None:
            _check_namespace(repo_id.split("/")[0], user)
        return _planned(export, repo_id, branch, create_pr, private)
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
    # A new branch starts from main.
    return _planned(export, repo_id, branch, create_pr, private, there=(branch and _look(repo_id, branch)) or there)


def plan_unseen(export: Export, repo_id: str, *, branch: str | None, create_pr: bool, private: bool) -> Push:
    """As `plan_push`, without asking the Hub: as if there were nothing yet."""
    check_name(repo_id)
    return _planned(export, repo_id, branch, create_pr, private)


def check_name(repo_id: str) -> None:
    """Raise `UpcycleError` for what cannot be the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UpcycleError(
            f"{repo_id} is no name on the Hub; write it as owner/name, of letters, digits, - _ ."
        ) from None
    if "/" not in repo_id:
        raise UpcycleError(f"{repo_id} is no name on the Hub; write it as owner/name")


def _planned(
    export: Export, repo_id: str, branch: str | None, create_pr: bool, private: bool, *, there: ModelInfo | None = None
) -> Push:
    """``there``: the repository, at the commit that will be the parent."""
    names = {sibling.rfilename for sibling in (there.siblings or [])} if there else set()
    local = export.folder / CARD
    existing = None
    if there and CARD in names:
        existing = _decode(_read(repo_id, str(there.sha), CARD), f"the {CARD} of {repo_id}")
    elif local.is_file():
        existing = _decode(local.read_bytes(), str(local))
    delete: list[str] = []
    if there and provenance.FILE in names:
        with suppress(ValueError):  # not ours: nothing of it is touched
            ours = set(provenance.parse(_read(repo_id, str(there.sha), provenance.FILE).decode())["files"])
            delete = sorted((ours & names) - {*export.files, CARD, provenance.FILE, ".gitattributes"})
    card: Card = make_card(export, repo_id)
    try:
        text = render(card, existing)
        kept = edited_parts(card, existing) if existing else []
        if existing and resets_licence(card, existing):
            export.notes.append("the licence in the card was changed; it is set back to that of the base")
    except UpcycleError as error:
        raise UpcycleError(f"{repo_id if there and CARD in names else local}: {error}") from error
    return Push(
        export, repo_id, branch, create_pr, private, there is None, text, kept, delete,
        there.sha if there else None,
    )  # fmt: skip


def _decode(text: bytes, what: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise UpcycleError(f"{what} is no UTF-8 text, so your edits of it cannot be kept; mend it first") from None


def _look(repo_id: str, branch: str | None = None) -> ModelInfo | None:
    """The repository, at the head of the branch; None where there is none, or it may not be seen."""
    with _explained(repo_id):
        try:
            return HfApi().model_info(repo_id, revision=branch)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None


def _read(repo_id: str, commit: str, name: str) -> bytes:
    """A small file of the repository. A commit never changes, so what the cache holds of it is right."""
    with _explained(repo_id):
        return Path(hf_hub_download(repo_id, name, revision=commit)).read_bytes()


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
    on_step(f"uploading to {repo}")
    with _explained(repo, undone):
        try:
            done = api.create_commit(
                repo,
                [*files, card, *gone],
                commit_message="Upload a model made by upcycle",
                revision=planned.branch,
                create_pr=planned.create_pr,
                parent_commit=planned.parent,
            )
        except Exception as error:
            if not _left_open(error):
                raise
            # The Hub may have committed all the same.
            if planned.create_pr:
                where = f"{constants.ENDPOINT}/{repo}/discussions"
                raise UpcycleError(
                    f"{_line(repo, error)}; it is not known whether the pull request was opened: look at {where}"
                ) from error
            head = _committed(planned, [*files, card])
            if head is None:
                raise
            return f"{constants.ENDPOINT}/{repo}/commit/{head}"
    if done.oid == planned.parent:
        on_step("everything is there already: nothing was committed")
    return done.pr_url or done.commit_url


def _left_open(error: Exception) -> bool:
    """Whether the request to commit was sent and its outcome is not known."""
    sent = any("/commit/" in _url(cause) for cause in causes(error))
    return sent and (_disconnected(error) or _status(error) >= 500)


def _url(error: Any) -> str:
    try:
        return str(error.request.url)
    except (AttributeError, RuntimeError):  # errors of transport may not know their request
        return ""


def _status(error: Exception) -> int:
    return next((cause.response.status_code for cause in causes(error) if isinstance(cause, HfHubHTTPError)), 0)


def _committed(planned: Push, sent: list[CommitOperationAdd]) -> str | None:
    """The head of the branch, if it holds what was to be committed."""
    with _explained(planned.repo_id, "it is not known whether it was committed; run the command again"):
        info = HfApi().model_info(planned.repo_id, revision=planned.branch, files_metadata=True)
    there = {sibling.rfilename: sibling for sibling in info.siblings or []}

    def same(operation: CommitOperationAdd) -> bool:
        found = there.get(operation.path_in_repo)
        if found is None or found.lfs is not None:
            return found is not None and found.lfs.sha256 == operation.upload_info.sha256.hex()
        with operation.as_file() as file:
            return found.blob_id == git_hash(file.read())

    done = all(map(same, sent)) and not set(planned.delete) & set(there)
    return str(info.sha) if done else None


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
