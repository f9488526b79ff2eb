"""Small artifacts with their checkpoints, and a way to spoil what an artifact computes."""

from types import SimpleNamespace

import pytest

import embedport
from embedport.artifact.folder import Artifact, write_manifest
from embedport.validation import parity


@pytest.fixture(scope="session")
def folders(tmp_path_factory, checkpoints):
    """A function (task, **options of export) -> the two folders, cached."""
    made = {}

    def make(task, **options):
        if options.get("precision") == "int4":
            options["fast"] = True  # calibration has tests of its own
        key = (task, *options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("artifact") / "model"
            embedport.export(checkpoints("kv2", task), folder, **options)
            made[key] = SimpleNamespace(artifact=folder, checkpoint=checkpoints("kv2", task))
        return made[key]

    return make


@pytest.fixture
def changed(copied):
    """A function (artifact, change) -> a copy, changed, with the right hashes in its manifest.

    As a wrong exporter would write it. The change is one of the folder, or of a file in it.
    """

    def make(artifact, change, file=""):
        folder = copied(artifact)
        change(folder / file)
        write_manifest(folder, Artifact.open(artifact).manifest, folder.name)
        return folder

    return make


@pytest.fixture
def spoil(monkeypatch):
    """A function that takes a change to a loaded artifact, made each time validate loads one."""
    load = parity.load

    def install(change):
        def spoiled(folder, **options):
            runtime = load(folder, **options)
            change(runtime)
            return runtime

        monkeypatch.setattr(parity, "load", spoiled)

    return install


def split_special_tokens(tokenizer):
    tokenizer.encode_special_tokens = True


def cut_on_the_left(tokenizer):
    tokenizer.enable_truncation(tokenizer.truncation["max_length"], direction="left")


def add_a_token(tokenizer):
    tokenizer.add_tokens(["camelCase"])


WRONG = [
    ("embedding", split_special_tokens),
    ("embedding", cut_on_the_left),
    ("reranker", cut_on_the_left),
    ("reranker", add_a_token),
]


@pytest.fixture(params=WRONG, ids=lambda wrong: f"{wrong[0]}-{wrong[1].__name__}")
def wrong_tokenizer(request):
    """A task, and a change to its tokenizer that gives few texts other token ids."""
    return request.param
