"""`embedport serve`."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError, require
from .inputs import BatchTokensOption, DeviceOption, TaskOption, check_task

KEY_VARIABLE = "EMBEDPORT_API_KEY"
MODULES = ("orjson", "prometheus_client", "starlette", "uvicorn")


def serve(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT…",
            help="Folders of artifacts or checkpoints, or hub ids: embedders and rerankers.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for every interface.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"A file with the key that requests must have (or ${KEY_VARIABLE})."),
    ] = None,
    device: DeviceOption = "auto",
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a text; default: the model's.")
    ] = None,
    batch_tokens: BatchTokensOption = None,
    task: TaskOption = None,
    max_texts: Annotated[int, typer.Option(min=1, help="Most texts of a request.")] = 2048,
    max_body: Annotated[int, typer.Option(min=1, help="Most MiB of a request's body.")] = 16,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Most texts of all requests at once; beyond it: 429.")
    ] = 8192,
) -> None:
    """Serve models over HTTP, as OpenAI's, Cohere's, Jina's and TEI's clients speak it.

    Example: embedport serve qwen3-int8 reranker-int8 --port 8000
    """
    for module in MODULES:
        require(module, "serve")
    from ..serve import Limits
    from ..serve import serve as run

    key = _read_key(api_key_file)
    if key is None and not _is_loopback(host):
        _say(f"no API key: everybody who reaches {host} can use the models")
    run(
        artifacts,
        host=host,
        port=port,
        device=device,
        max_length=max_length,
        batch_tokens=batch_tokens,
        task=check_task(task),
        limits=Limits(max_texts, max_body << 20, max_queue),
        api_key=key,
        say=_say,
    )


def _say(line: str) -> None:
    typer.echo(f"embedport: {line}", err=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_key(file: Path | None) -> str | None:
    """The key of a file or of the environment; None if there is neither."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
        place = f"${KEY_VARIABLE}"
    else:
        place = str(file)
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"{place} should hold a key of printable ASCII without spaces")
    return key
