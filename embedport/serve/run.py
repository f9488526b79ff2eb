"""Runs the application on a port until it is stopped."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import uvicorn

from ..checkpoint.pipeline import Task
from ..errors import InputError
from ..runtimes import Embedder, load
from ..runtimes.info import choose_length, read_info
from .app import create_app
from .limits import Limits
from .models import ServedModel, name_model, served

logger = logging.getLogger(__name__)

# Seconds that an idle connection stays open. Load balancers keep theirs for 60, and would send a
# request into one that is just being closed.
IDLE_SECONDS = 75
# Seconds that requests have to finish after the server is told to stop.
GRACE_SECONDS = 30
BACKLOG = 2048


def serve(
    artifacts: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    max_length: int | None = None,
    batch_tokens: int | None = None,
    task: Task | None = None,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    api_key: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve models until SIGINT or SIGTERM; requests at work are then finished.

    Args:
        artifacts: Folders or hub ids, as for `load`: embedders and rerankers.
        host: The address to listen on.
        port: The port; 0 for any that is free.
        device: As for `load`.
        max_length: As for `load`.
        batch_tokens: As for `Embedder.encode`.
        task: As for `load`, for every model.
        limits: The limits.
        api_key: The key that requests must have; None for no key.
        say: Called with each message to the user.

    Raises:
        InputError: The port cannot be listened on, or two models have the same name.
        EmbedportError: A model cannot be loaded.
    """
    if limits.texts > limits.queue:
        raise InputError(
            f"the queue should hold at least the {limits.texts:,} texts of one request, found "
            f"{limits.queue:,}"
        )
    names = _name(artifacts)
    for artifact in artifacts:  # what is wrong with a folder is said before the port opens
        choose_length(read_info(artifact, task), max_length)
    listener = _listen(host, port)
    failures: list[BaseException] = []

    def stop(*_signal: object) -> None:
        server.should_exit = True

    def fail(error: BaseException) -> None:
        failures.append(error)
        stop()

    load_all = partial(_load, names, device, max_length, batch_tokens, task, say)
    app = create_app(load_all, limits, api_key=api_key, failed=fail)
    config = uvicorn.Config(
        app,
        # httptools loses the body of a request that offers h2c, as all of Java's HttpClient do.
        http="h11",
        log_config=None,
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
    )
    # Its warnings are of requests that are no HTTP, or ask for WebSockets: the client is told.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    server = uvicorn.Server(config)
    shown = f"[{host}]" if ":" in host else host
    say(f"listening on http://{shown}:{listener.getsockname()[1]} (Ctrl-C stops)")
    # uvicorn's own handlers come with its start, which takes a moment. When it has stopped, it
    # raises the signal again, which would end the process abnormally.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listener.close()
    if failures:
        raise failures[0]
    say("stopped")


def _name(artifacts: Sequence[str]) -> dict[str, str]:
    """Model name to artifact."""
    names: dict[str, str] = {}
    for artifact in artifacts:
        name = name_model(artifact)
        if name in names:
            raise InputError(
                f"{names[name]} and {artifact} would both be served as {name!r}: rename a folder"
            )
        names[name] = artifact
    return names


def _load(
    names: Mapping[str, str],
    device: str,
    max_length: int | None,
    batch_tokens: int | None,
    task: Task | None,
    say: Callable[[str], None],
) -> dict[str, ServedModel]:
    models = {}
    for name, artifact in names.items():
        runner = load(artifact, device=device, max_length=max_length, task=task)
        models[name] = served(name, runner, batch_tokens)
        width = f" of {runner.dim} values" if isinstance(runner, Embedder) else ""
        say(f"{name}: {runner.info.task} model{width}, {runner.precision} on {runner.device}")
    return models


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        # create_server puts the address behind the system's words.
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise InputError(
            f"cannot listen on {host}:{port}: {reason}; choose another `port` or `host`"
        ) from error
    listener.set_inheritable(False)
    return listener
