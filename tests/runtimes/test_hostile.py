"""Folders made to run code or to reach outside: nothing of theirs runs, nothing outside is read."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.errors import CheckpointError, EmbedportError, InputError


@pytest.fixture
def folder(checkpoints, copied):
    return copied(checkpoints("kv1"))


@pytest.fixture
def trap(tmp_path):
    """A file that exists as soon as foreign code ran."""
    return tmp_path / "sprung"


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def code(trap):
    return f"open({str(trap)!r}, 'w').close()\n"


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights(folder, trap):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Touch(trap)}))
    embedport.load(folder, device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled and is not read"):
        embedport.load(folder, device="cpu")
    assert not trap.exists()


def test_code_of_the_checkpoints_own(folder, trap):
    (folder / "modeling_evil.py").write_text(code(trap) + "class Evil: pass\n")
    change(folder, auto_map={"AutoModel": "modeling_evil.Evil"})
    with pytest.raises(CheckpointError, match="auto_map names code of the checkpoint's own"):
        embedport.load(folder, device="cpu")
    assert not trap.exists()


def test_what_config_json_says_besides_is_not_heard(folder, checkpoints):
    """Paths and names that transformers would follow."""
    change(
        folder,
        _name_or_path="/somewhere/else",
        attn_implementation="someone/evil-kernels",
        _attn_implementation="someone/evil-kernels",
        base_model_name_or_path="someone/evil",
    )
    found = embedport.load_embedder(folder, device="cpu")
    expected = embedport.load_embedder(checkpoints("kv1"), device="cpu")
    np.testing.assert_array_equal(found.encode(["a text"]), expected.encode(["a text"]))


@pytest.mark.parametrize("quantized_by", [None, "w8a8"])
@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_leads_outside(folder, quantized, copied, tmp_path, absolute, quantized_by):
    if quantized_by:
        folder = copied(quantized(quantized_by))
        (folder / "embedport.json").unlink()
    names = list_names(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    path = str(tmp_path / "outside.safetensors") if absolute else "../outside.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, path)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="should be in a file beside the index"):
        embedport.load(folder, device="cpu")


def list_names(path):
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as shard:
        return list(shard.keys())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("kind", ["checkpoint", "artifact"])
def test_links_that_lead_outside(folder, quantized, copied, tmp_path, name, kind):
    if kind == "artifact":
        folder = copied(quantized("gptq"))
    outside = tmp_path / f"outside-{name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(InputError, match=f"{name} is a link to .*, outside the folder"):
        embedport.load(folder, device="cpu")


def test_the_hubs_cache_is_made_of_links(folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(each for each in folder.rglob("*") if each.is_file())):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(exist_ok=True)
        path.rename(blobs / str(i))
        link.symlink_to(blobs / str(i))
    model = embedport.load(snapshot, device="cpu")
    assert model.info.precision == "bf16"


def test_an_adapter_is_not_passed_over(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/evil"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: .* give `adapter`"):
        embedport.load(folder, device="cpu")


def test_names_that_compressed_tensors_takes_for_files(quantized, copied, tmp_path, trap):
    folder = copied(quantized("w8a8"))
    (folder / "embedport.json").unlink()
    evil = tmp_path / "evil.py"
    evil.write_text(code(trap) + "class Evil: pass\n")
    name = f"{evil}:Evil"
    good = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights = good["config_groups"]["group_0"]
    for changes, message in (
        ({"format": name}, "in the group 'int-quantized'"),
        (
            {"format": name, "config_groups": {"a": weights | {"format": name}}},
            "format should be one of",
        ),
        ({"config_groups": {"group_0": weights | {"format": name}}}, "in the group"),
        ({"transform_config": {"config_groups": {"x": {"type": name}}}}, "transform_config is not"),
        ({"sparsity_config": {"format": name}}, "sparsity_config is not read"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not read"),
        ({"config_groups": {}}, "should hold a group"),
        ({"config_groups": {"a": {"weights": None}}}, "should have weights"),
        ({"ignore": [1]}, "should be lists of names"),
        (
            {"config_groups": {"a": weights | {"output_activations": {"num_bits": 8}}}},
            "output_activations should be absent",
        ),
    ):
        change(folder, quantization_config=good | changes)
        with pytest.raises(CheckpointError, match=message):
            embedport.load(folder, device="cpu")
    change(folder, quantization_config=good | {"version": name, "surprise": name})
    embedport.load(folder, device="cpu")
    assert not trap.exists()


def test_zero_points_that_are_not_there(quantized, copied):
    """They are not taken for 0."""
    folder = copied(quantized("w8a8"))
    (folder / "embedport.json").unlink()
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"symmetric": true', '"symmetric": false'))
    with pytest.raises(CheckpointError, match=r"weight_zero_point is missing"):
        embedport.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "quark"}, "quantized by 'quark'"),
        ({}, "quantized by None"),
        ("bitsandbytes", "should be an object"),
        ({"quant_method": "bitsandbytes"}, "should be load_in_8bit, or load_in_4bit"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "with bnb_4bit_quant_type 'nf4'",
        ),
    ],
)
def test_unknown_methods(folder, quantization, message):
    change(folder, quantization_config=quantization or {"bits": 4})
    with pytest.raises(CheckpointError, match=message):
        embedport.load(folder, device="cpu")


# Two programs share what both import, and each runs in a copy of the process. None of it brings
# bitsandbytes, whose first import is what they are about.
FORKS = """
import os, sys
import torch, torch._dynamo, transformers.models.qwen3.modeling_qwen3
assert not {"bitsandbytes", "peft", "sentence_transformers"} & sys.modules.keys()
folder, *programs = sys.argv[1:]
sys.path.insert(0, folder)
for number, program in enumerate(programs):
    child = os.fork()
    if child == 0:
        sys.stdout = open(f"{folder}/{number}.out", "w")
        os.dup2(os.open(f"{folder}/{number}.err", os.O_CREAT | os.O_WRONLY), 2)
        exec(program)
        sys.stdout.close()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def without_kernels(quantized, checkpoints, tmp_path_factory):
    """Load checkpoints of bitsandbytes, and open a reference, where a package `kernels` is a trap.

    Returns:
        The folder: 0.out and 0.err, 1.out and 1.err, and "sprung" if the trap is.
    """
    folder = tmp_path_factory.mktemp("kernels")
    trap = code(folder / "sprung")
    (folder / "kernels.py").write_text(f"def get_kernel(*a, **k):\n    {trap}")
    load = (
        "import embedport\n"
        f"for folder in {[str(quantized(method)) for method in ('bnb-nf4', 'bnb-int8')]}:\n"
        "    print(embedport.load(folder, device='cpu').encode(['a']).shape)\n"
        "import kernels; print(kernels.get_kernel.__name__)\n"
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    refer = (
        "from embedport.validation.opening import open_live\n"
        f"open_live({str(checkpoints('kv1'))!r}, device='cpu')\n"
        "print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules)"
    )
    command = [sys.executable, "-c", FORKS, str(folder), load, refer]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    errors = [path.read_text() for path in sorted(folder.glob("*.err"))]
    assert (ran.stdout, ran.stderr, errors) == ("0\n0\n", "", ["", ""])
    return folder


def test_bitsandbytes_fetches_no_kernel(without_kernels):
    """On a CPU with bf16 it would take code off the hub where the package `kernels` is.

    And say so where there is none, and of each 8-bit product that it rounds its input.
    """
    assert (without_kernels / "0.out").read_text() == "(1, 128)\n(1, 128)\nget_kernel\nFalse\n"
    assert not (without_kernels / "sprung").exists()


def test_a_reference_fetches_no_kernel(without_kernels):
    """sentence-transformers imports PEFT, and PEFT bitsandbytes, also of a plain checkpoint.

    bitsandbytes compiles functions when it is imported, and to import the compiler takes seconds.
    """
    assert (without_kernels / "1.out").read_text() == "True False\n"
    assert not (without_kernels / "sprung").exists()


def test_damage_is_an_error_of_ours(folder):
    """Shapes that do not fit, which torch would meet too late."""
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.0.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"][:-1].copy()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(EmbedportError, match=r"up_proj\.weight should have shape"):
        embedport.load(folder, device="cpu")
