"""A reward model from the Hub into a folder, and a folder to the Hub.

python -m open_rm.hub pull entity/name --folder models/name
python -m open_rm.hub push --folder output/my_run --repo_id entity/name
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from open_rm import command_line


@dataclass(frozen=True)
class PullArgs:
    """Download a model: whole, every file held against the Hub's hashes, or not there. The same command goes on."""

    repo_id: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="REPO")]]
    """The repository, entity/name."""
    folder: str
    """The folder to make."""
    revision: str = "main"
    """Branch, tag or commit. A run pushes to a branch of its name."""


@dataclass(frozen=True)
class PushArgs:
    """Push a saved reward model."""

    folder: str
    """The folder that holds the model."""
    repo_id: str
    """The repository, entity/name; created private if it does not exist."""
    revision: str = "main"
    """The branch; created if it does not exist."""
    private: bool = True
    """Whether a newly created repository is private."""


COMMANDS = (
    Annotated[PullArgs, tyro.conf.subcommand("pull", prefix_name=False)]
    | Annotated[PushArgs, tyro.conf.subcommand("push", prefix_name=False)]
)


def main(args: PullArgs | PushArgs) -> None:
    """Print what was done."""
    # Here, because it takes seconds, and a wrong command line is answered before.
    from open_rm.publishing.pulling import pull_model
    from open_rm.publishing.pushing import push_folder

    if isinstance(args, PullArgs):
        print(pull_model(args.repo_id, args.folder, revision=args.revision))
    else:
        print(push_folder(args.folder, args.repo_id, revision=args.revision, private=args.private))


if __name__ == "__main__":
    command_line.run(main, tyro.cli(COMMANDS, use_underscores=True, prog="python -m open_rm.hub"))
