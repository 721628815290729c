"""Push a saved reward model to the Hub: the command that a failed push names.

python -m open_rm.hub --folder output/my_run --repo_id entity/name
"""

import sys
from dataclasses import dataclass

import tyro

from open_rm.errors import UserError
from open_rm.publishing.pushing import push_folder


@dataclass(frozen=True)
class PushArgs:
    """Push a saved reward model to the Hub."""

    folder: str
    """The folder that holds the model."""
    repo_id: str
    """The repository, entity/name; created private if it does not exist."""
    revision: str = "main"
    """The branch; created if it does not exist."""
    private: bool = True
    """Whether a newly created repository is private."""


if __name__ == "__main__":
    args = tyro.cli(PushArgs, use_underscores=True)
    try:
        print(push_folder(args.folder, args.repo_id, revision=args.revision, private=args.private))
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
