"""Folders that other software deploys: a Triton repository, a container, a Vespa component."""

from __future__ import annotations

from .docker import deploy_docker
from .triton import deploy_triton
from .vespa import deploy_vespa

__all__ = ["deploy_docker", "deploy_triton", "deploy_vespa"]
