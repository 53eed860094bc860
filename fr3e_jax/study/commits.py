"""The commit of the code that makes a run, and the code of an earlier commit."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from fr3e_jax.config import PACKAGE

CHANGED = "+"  # behind a commit, where files of the package differ from it


def git(*arguments: str) -> str:
    """The output of a git command in the repository of this package.

    Raises:
      OSError: there is no git.
      CalledProcessError: it fails, as outside of a repository.
    """
    command = ["git", "-C", str(PACKAGE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def commit_of_code() -> str:
    """The commit of the code, with `+` where files differ from it; `unknown` outside of a repository."""
    try:
        head = git("rev-parse", "--short=12", "HEAD").strip()
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(PACKAGE)).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (CHANGED if changed else "")


@contextlib.contextmanager
def code_of(commits: str, console: Console) -> Iterator[Path | None]:
    """Check out the code that made a run, for as long as the block runs.

    Two versions of the code may round differently in the last digit, after which a run draws other tokens.

    Args:
      commits: that made the run, one after the other, as `RunResult.commit`; the last counts.
      console: where people read that the code of this version is taken in its place.

    Yields:
      The directory that its package is in; None: this version.
    """
    commit = commits.split()[-1] if commits.split() else "unknown"
    if commit == commit_of_code():
        yield None
        return
    with contextlib.ExitStack() as stack:
        tree = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "code"
        try:
            git("worktree", "add", "--detach", str(tree), commit)
            package = tree / git("rev-parse", "--show-prefix").strip()
        except (OSError, subprocess.CalledProcessError):
            console.print(
                f"it was made by commit {commit}, which is not in this repository (`git fetch --unshallow` "
                "gets older ones): this version runs it, and rounding may differ",
                markup=False,
            )
            yield None
            return
        stack.callback(git, "worktree", "remove", "--force", str(tree))
        console.print(f"with the code of commit {commit}, which made it", markup=False)
        yield package.parent
