"""Where a run is pushed to: checked before training, and no loss if it fails at the end."""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, constants


class HubError(RuntimeError):
    """The Hub cannot be pushed to; the message says why and what to do."""


@dataclass(frozen=True)
class HubRepository:
    """A model repository to push a directory to.

    Attributes:
        repo_id: ``name`` (of the user whose token it is) or ``namespace/name``.
        private: Create it as a private one. One that exists stays as it is.
        revision: Branch, created if it is not there; None for the main one.
        token: None: ``HF_TOKEN``, or what ``hf auth login`` stored. It appears in no message.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    def prepare(self) -> str:
        """Check the token, and create repository and branch where they are missing.

        To be called before training, so that a mistake does not show after days.

        Returns:
            ``namespace/name``.

        Raises:
            HubError: If the Hub cannot be reached or refuses.
        """
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                f"Cannot push to {self.repo_id}: HF_HUB_OFFLINE is set. Unset it, or push "
                "afterwards with `hf upload`."
            )
        api = HfApi(token=self.token)
        try:
            api.whoami()
            url = api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
            if self.revision is not None:
                api.create_branch(url.repo_id, branch=self.revision, exist_ok=True)
            api.auth_check(url.repo_id, write=True)
        except Exception as error:  # of the network, of the Hub, of the name
            raise HubError(
                f"Cannot push to {self.repo_id}: {self._reason(error)}\n"
                "Check the name, and that `hf auth whoami` knows a token that may write; or push "
                "afterwards with `hf upload`."
            ) from error
        return url.repo_id

    def push(self, directory: str | os.PathLike, message: str) -> str:
        """Upload all files of a directory in one commit.

        Args:
            directory: Of a saved model.
            message: Of the commit.

        Returns:
            Address of the commit.

        Raises:
            HubError: If it fails. The message has the command that pushes the directory again.
        """
        try:
            commit = HfApi(token=self.token).upload_folder(
                repo_id=self.repo_id,
                folder_path=directory,
                revision=self.revision,
                commit_message=message,
            )
        except Exception as error:  # as above; whatever it is, the run must not end without a word
            raise HubError(
                f"Not pushed to {self.repo_id}: {self._reason(error)}\n"
                f"Nothing is lost: all is in {Path(directory).resolve()}. To push it again:\n"
                f"{self.push_command(directory)}"
            ) from error
        return str(commit.commit_url)

    def push_command(self, directory: str | os.PathLike) -> str:
        """Shell command that does what :meth:`push` does; without a token."""
        command = ["hf", "upload", self.repo_id, str(Path(directory).resolve())]
        command += ["--private"] if self.private else []
        command += ["--revision", self.revision] if self.revision else []
        return shlex.join(command)

    def _reason(self, error: Exception) -> str:
        text = str(error) or type(error).__name__
        return text if self.token is None else text.replace(self.token, "TOKEN")


def prepare_repository(accelerator: Accelerator, repository: HubRepository) -> HubRepository:
    """:meth:`HubRepository.prepare` in the main process alone; all get the result or the error.

    Returns:
        The repository under its whole name.

    Raises:
        HubError: In every process, so that none is left waiting.
    """
    result: list[str | None] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = repository.prepare()
        except HubError as error:
            result[1] = str(error)
    repo_id, problem = broadcast_object_list(result)
    if problem is not None:
        raise HubError(problem)
    return HubRepository(repo_id, repository.private, repository.revision, repository.token)
