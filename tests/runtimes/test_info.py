"""A model's hash: it changes with every file that decides a result."""

from safetensors.numpy import load_file, save_file

from embedport.runtimes.info import hash_model, read_info
from tests.pipeline.conftest import write_modules

LAST = ("Pooling", {"embedding_dimension": 64, "pooling_mode": "lasttoken"})
TANH = "torch.nn.modules.activation.Tanh"


def test_every_file_that_decides_counts_for_a_models_hash(checkpoints, copied):
    """A second chat template is one: sentence-transformers then takes messages to have parts."""
    folder = copied(checkpoints())
    hashes = {hash_model(read_info(folder))}
    for name in ("chat_template.jinja", "additional_chat_templates/x.jinja", "2_Dense/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        hashes.add(hash_model(read_info(folder)))
    assert len(hashes) == 4


def test_folders_that_change_places_count_for_a_models_hash(checkpoints, copied):
    """Two Dense modules have files of the same names; in another order they give other vectors."""
    folder = copied(checkpoints())
    hashes = set()
    for texts in (("{}", "[]"), ("[]", "{}")):
        for name, text in zip(("2_Dense", "3_Dense"), texts, strict=True):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "config.json").write_text(text)
        hashes.add(hash_model(read_info(folder)))
    assert len(hashes) == 2


def test_a_dense_modules_weights_count_for_a_models_hash(checkpoints, copied):
    folder = copied(checkpoints())
    shape = {"in_features": 64, "out_features": 32}
    write_modules(folder, [LAST, ("Dense", shape | {"bias": False, "activation_function": TANH})])
    before = hash_model(read_info(folder))
    path = folder / "2_Dense" / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path)
    assert hash_model(read_info(folder)) != before
