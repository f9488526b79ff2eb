"""A model's hash: it changes with every file that decides a result."""

from embedport.runtimes.info import hash_model, read_info


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
