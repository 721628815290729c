"""Serve a trained reward model over HTTP, in the forms that RL trainers already send (docs/serving.md).

python -m open_rm.serve --model output/my_run
"""

from dataclasses import dataclass

from open_rm import command_line
from open_rm.checks import check_values
from open_rm.errors import UserError
from open_rm.flags import OpeningFlags
from open_rm.serving.limits import TOKEN_VARIABLE, ServingFlags
from open_rm.serving.listening import allow_connections, listen, url_of


@dataclass(frozen=True, kw_only=True)
class ServeArgs(ServingFlags, OpeningFlags):
    """Serve a trained reward model to RL trainers. The environment variable OPEN_RM_SERVE_TOKEN holds a token to ask for."""


def check(args: ServeArgs) -> None:
    """Values that cannot work, alone or together, and a port that is in use."""
    check_values(args)
    if args.max_texts_per_request > args.max_waiting_texts:
        raise UserError(
            f"--max_texts_per_request {args.max_texts_per_request} is more than --max_waiting_texts "
            f"{args.max_waiting_texts}, so the largest request would never be taken; lower one or raise the other"
        )
    if args.max_body_mib > args.max_waiting_mib:
        raise UserError(
            f"--max_body_mib {args.max_body_mib:g} is more than --max_waiting_mib {args.max_waiting_mib:g}, so the largest "
            "body would never be taken; lower one or raise the other"
        )
    listen(args).close()


if __name__ == "__main__":  # a wrong command line is answered before the imports below, which take seconds
    ARGUMENTS = command_line.read(ServeArgs, check, prog="python -m open_rm.serve")

import asyncio
import logging
import math
import os
import socket
import sys
import time

import transformers

from open_rm.scoring.opening import open_scorer
from open_rm.scoring.scorer import Scorer
from open_rm.serving.application import Service
from open_rm.serving.connections import Server
from open_rm.serving.texts import Reader


def main(args: ServeArgs) -> None:
    """Bind, load, try, serve, drain."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    listener = listen(args)
    with open_scorer(args) as scorer:
        serve(scorer, args, listener)


def serve(scorer: Scorer, args: ServeArgs, listener: socket.socket) -> None:
    """Serve an open model until a signal comes and what was accepted is answered.

    Raises:
        UserError: the model gives no reward, or the port was taken meanwhile.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip() or None
    reader = Reader(scorer, unfinished=args.unfinished)
    for line in [*scorer.lines, *reader.lines, *_precautions(args, token), _trial(scorer, reader)]:
        print(line, flush=True)
    if not asyncio.run(_served(scorer, reader, args, listener, token)):
        os._exit(1)  # a batch is still being scored, and nobody waits for it


async def _served(scorer: Scorer, reader: Reader, args: ServeArgs, listener: socket.socket, token: str | None) -> bool:
    """Whether all that was accepted was answered."""
    ready = f"serving {scorer.name} on {url_of(listener)}"
    server = Server(Service(scorer, reader, args, token), listener, lambda: print(ready, flush=True))
    await server.serve(sockets=[listener])
    return server.drained


def _precautions(args: ServeArgs, token: str | None) -> list[str]:
    """What whoever starts the server should know."""
    lines = allow_connections(args.max_connections)
    if args.host not in ("127.0.0.1", "::1", "localhost") and token is None:
        lines.append(f"whoever reaches {args.host} can ask for rewards; set {TOKEN_VARIABLE} to ask for a token")
    return lines


def _trial(scorer: Scorer, reader: Reader) -> str:
    """Score something, so that a model that cannot is found before anybody asks."""
    sequences = reader.sequences([reader.sample()])
    began = time.monotonic()
    reward = float(scorer.rewards(sequences)[0])
    if not math.isfinite(reward):
        raise UserError(f"--model {scorer.name}: its reward of a trial is {reward}, which is no number")
    return f"trial: {len(sequences[0])} tokens in {time.monotonic() - began:.3f} s, reward {reward:.4f}"


if __name__ == "__main__":
    command_line.run(main, ARGUMENTS)
