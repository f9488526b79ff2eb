"""The examples in the docstrings of the public functions run, and give what they say."""

import doctest
import inspect

import pytest

import embedport
from embedport.demo.pipeline import builtin_embedder, builtin_reference, builtin_reranker

# Results, and what functions return; the functions' examples show them.
WITHOUT = {"Check", "EmbedportError", "Embedder", "Ranked", "Report", "Reranker", "__version__"}
PUBLIC = [name for name in embedport.__all__ if name not in WITHOUT]
METHODS = ["Embedder.encode", "Reranker.rank", "Reranker.score"]
WITNESSES = True


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names that examples use: a checkpoint, artifacts, a recorded reference, a folder."""
    folder = tmp_path_factory.mktemp("examples")
    checkpoint = builtin_embedder()
    embedport.export(checkpoint, folder / "embedder")
    embedport.export(builtin_reranker(), folder / "reranker")
    return {
        **{name: getattr(embedport, name) for name in embedport.__all__},
        "embedport": embedport,
        "checkpoint": checkpoint,
        "embedder": folder / "embedder",
        "reranker": folder / "reranker",
        "reference": builtin_reference(checkpoint),
        "folder": folder,
    }


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_example(name, names):
    value = embedport
    for part in name.split("."):
        value = getattr(value, part)
    tests = doctest.DocTestFinder().find(value, name, globs=names)
    examples = [test for test in tests if test.examples]
    assert examples, f"{name} has no example"
    for test in examples:
        output: list[str] = []
        result = doctest.DocTestRunner().run(test, out=output.append)
        assert result.failed == 0, "".join(output)
    assert inspect.getdoc(value)
