"""The upload of a finished folder to the Hugging Face Hub; an export does it only when it is told where to."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from mini_qwen.files import brief


def check_repo_id(repo_id: str) -> None:
    """Raises SystemExit for what cannot be the name of a repository: `OWNER/NAME` is."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SystemExit(f"--push {repo_id!r} is no repository of the Hub, OWNER/NAME: {brief(error)}") from None
    if repo_id.count("/") != 1:
        raise SystemExit(f"--push {repo_id!r} names no owner. A repository of the Hub is OWNER/NAME.")


def push(folder: Path, repo_id: str) -> str:
    """Upload all files of the folder, and return the address. A repository that is not there yet is made, private.

    Raises SystemExit when that does not go well; the folder stays as it is.
    """
    again = f"The folder '{folder}' is whole. Upload it with: hf upload {repo_id} {folder}"
    try:
        api = HfApi()
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload by mini_qwen's utils/export.py")
    except OfflineModeIsEnabled:
        raise SystemExit(f"Nothing was uploaded: HF_HUB_OFFLINE is set. Unset it. {again}") from None
    except Exception as error:  # the library's own, and those of whichever HTTP client it uses
        raise SystemExit(
            f"The upload to {repo_id} failed: {brief(error)}. Log in with 'hf auth login', see that the connection "
            f"stands. {again}"
        ) from None
    return str(url)
