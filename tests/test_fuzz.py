"""Mutated folders through inspect, export, load and encode: each is refused in words, or runs.

A broken or hostile folder may give an error of ours, and nothing else: no other exception, no "this
is a bug", no wait of more than 10 seconds, no GB of memory. The examples are the same in every run;
more of them, and others:

    EMBEDPORT_FUZZ=3000 EMBEDPORT_FUZZ_SEED=7 pytest tests/test_fuzz.py --hypothesis-show-statistics
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import socket
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import embedport
from embedport.checkpoint.tensor_files import SINGLE
from embedport.cli import main
from embedport.errors import EmbedportError
from tests.synthetic import Geometry, write_checkpoint
from tests.tokenizer_rules import SECOND, SPECIAL, TEXT, replace, sequence, split, template

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="FIFOs, signals and /proc")

EXAMPLES = int(os.environ.get("EMBEDPORT_FUZZ", "60"))
# Bytes of a file that is no small one any more.
LARGE = 1 << 24
SEED = int(os.environ.get("EMBEDPORT_FUZZ_SEED", "0"))
SECONDS, WAIT = 10, 60
SUFFIXES = (".json", ".jinja", ".safetensors")
MOST_MEMORY = 1 << 30
GEOMETRY = Geometry(32, 1, 2, 1, 16, 64)

# What a second change raises where the first has broken the file.
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)

# Values that JSON's own writer does not give: a placeholder is replaced by the text.
RAW = {
    "@deep-list@": "[" * 3000 + "]" * 3000,
    "@deep-object@": '{"a":' * 90_000 + "1" + "}" * 90_000,
    "@long-integer@": "9" * 5000,
    "@integer@": "9" * 90,
    "@infinite@": "1e999",
}
ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 33, 1024, 2**31, 2**32 - 1, 2**63, 10**30, 0.5),
    *(1e308, -1e-9, float("nan"), float("inf"), "", "a", "a" * 300, "b" * 5000, "\0", "\ud800"),
    *("..", "../x", "/dev/zero", "model.safetensors", "qwen3", "embedding", "[red]", [], {}),
    *([0], ["a"], [[]], [None], {"a": 1}, {"type": "x"}, {"": {}}, [1] * 3000),
    *RAW,
]
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers(),
    st.floats(),
    # The alphabet of text() itself, which it would find by encoding every character.
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
KINDS = (
    *("fifo", "folder", "socket", "loop", "two", "urandom", "zero", "null", "none", "dangling"),
    *("self", "large"),
)
NEW = (
    *("model.safetensors.index.json", "adapter_config.json", "modules.json", "chat_template.jinja"),
    *("tokenizer_config.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
)
# What ends the tokenizers library, or once did.
TOKENIZERS = [
    ("post_processor", {"type": "TemplateProcessing", "single": [TEXT] * 3000, "pair": []}),
    ("post_processor", {"type": "BertProcessing", "sep": ["a", 2**32 - 1], "cls": ["b", 7]}),
    ("post_processor", {"type": "Sequence", "processors": []}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
    ("normalizer", {"type": "Prepend", "prepend": "▁" * 3000}),
    ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    ("padding", {"strategy": {"Fixed": 2**60}, "direction": "Right", "pad_id": 0}),
    (
        "truncation",
        {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 9},
    ),
    ("post_processor", template([1] * 100_000)),
    ("post_processor", template([1] * 900, [TEXT, *[SPECIAL] * 900])),
    ("post_processor", template([5000])),
    ("post_processor", template([2**32 - 1])),
    ("post_processor", template([])),
    ("post_processor", template([1]) | {"special_tokens": {}}),
    ("post_processor", template([1], [TEXT] * 9)),
    ("post_processor", template([1], [SECOND])),
    ("normalizer", replace({"String": "a"}, "a" * 10, 9)),
    ("normalizer", replace({"Regex": ""}, "a" * 10, 9)),
    ("normalizer", sequence("normalizers", {"type": "ByteLevel"}, 40)),
    ("pre_tokenizer", split("(a|aa)+$")),
    ("pre_tokenizer", split("(((a{1,999}){1,999}){1,999})*")),
    ("pre_tokenizer", split("(" * 3000)),
    ("pre_tokenizer", split("")),
]
VOCABULARY_IDS = [-1, 1.5, "a", 5000, 2**22 - 1, 2**22, 2**31, 2**32 - 1, 2**32]


@pytest.fixture(scope="module")
def originals(tmp_path_factory, small_tokenizer):
    """Folders to mutate: checkpoints and artifacts of both tasks, in one file and in shards."""
    base = tmp_path_factory.mktemp("originals")
    found = {}
    for task in ("embedding", "reranker"):
        folder = base / task
        found[task] = write_checkpoint(folder, GEOMETRY, task, small_tokenizer, dtype="float32")
        found[f"{task}-artifact"] = base / f"{task}-artifact"
        embedport.export(folder, found[f"{task}-artifact"])
    found["shards"] = write_checkpoint(
        base / "shards", GEOMETRY, "embedding", small_tokenizer, shard_bytes=20_000
    )
    found["quantized"] = base / "quantized"
    embedport.quantize_checkpoint(
        found["embedding"], found["quantized"], method="awq", group_size=32
    )
    found["adapter"] = write_adapter(base / "adapter", found["embedding"])
    found["act-order"] = write_act_order(found["embedding"], base / "act-order")
    return found


def write_act_order(original, folder):
    """A copy with every projection as GPTQ's codes, inputs in any order; all of them random."""
    rng = np.random.default_rng(0)
    shutil.copytree(original, folder)
    tensors = {}
    for name, value in load_file(folder / SINGLE).items():
        if "_proj" not in name:
            tensors[name] = value
            continue
        (rows, columns), matrix = value.shape, name.removesuffix(".weight")
        sizes = {"qweight": (columns // 8, rows), "qzeros": (columns // 16, rows // 8)}
        for part, size in sizes.items():
            words = rng.integers(0, 2**32, size, dtype=np.uint32)
            tensors[f"{matrix}.{part}"] = words.view(np.int32)
        tensors[f"{matrix}.scales"] = np.full((columns // 16, rows), 0.01, np.float16)
        order = rng.permutation(np.arange(columns, dtype=np.int32) // 16)
        tensors[f"{matrix}.g_idx"] = order
    save_file(tensors, folder / SINGLE)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        **{"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
        "dynamic": {"k_proj": {"bits": 8}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder, base):
    """An adapter of three layers, as PEFT saves it."""
    folder.mkdir()
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "revision": None,
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"layers.0.*q_proj": 3},
        "alpha_pattern": {},
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "layers_pattern": "layers",
        "layers_to_transform": None,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    shapes = {
        "layers.0.self_attn.q_proj.lora_A.weight": (3, 32),
        "layers.0.self_attn.q_proj.lora_B.weight": (32, 3),
        "layers.0.mlp.down_proj.lora_A.weight": (2, 64),
        "layers.0.mlp.down_proj.lora_B.weight": (32, 2),
        "embed_tokens.lora_embedding_A": (2, rows),
        "embed_tokens.lora_embedding_B": (32, 2),
    }
    tensors = {
        f"base_model.model.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    embedport.load(folder, device="cpu")
    return folder


def small_files(folder):
    """Files whose text can be changed; one change may have made another file very large."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in SUFFIXES and path.stat().st_size < 1 << 24
    )


def walk(values, path=()):
    """The places in JSON values."""
    yield path
    if isinstance(values, dict | list) and len(path) < 5:
        keys = list(values) if isinstance(values, dict) else list(range(len(values)))
        for key in keys[:60]:
            yield from walk(values[key], (*path, key))


def change_json(draw, path):
    """Change, delete, add or rename one value of a JSON file."""
    values = json.loads(path.read_text())
    place = draw(st.sampled_from(list(walk(values))))
    if not place:
        values = draw(VALUES)
    else:
        holder = values
        for key in place[:-1]:
            holder = holder[key]
        what = draw(st.sampled_from(["change", "change", "delete", "wrap", "rename", "add"]))
        old = holder[place[-1]]
        if what == "change":
            holder[place[-1]] = draw(VALUES)
        elif what == "wrap":
            holder[place[-1]] = draw(st.sampled_from([[old], {"a": old}, [old, old], str(old)]))
        else:
            del holder[place[-1]]
            if isinstance(holder, dict) and what != "delete":
                key = draw(
                    st.sampled_from(["a", "", "\0", "c" * 5000, "../x", str(place[-1]) + "s"])
                )
                holder[key] = old
    write_raw(path, values)


def write_raw(path, values):
    text = json.dumps(values)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    path.write_text(text)


def change_bytes(draw, path):
    data = path.read_bytes()
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    path.write_bytes(
        draw(
            st.sampled_from(
                [
                    b"",
                    data[:at],
                    data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :],
                    data[:at] + data[at + 7 :],
                    data + b"}",
                    b"\xef\xbb\xbf" + data,
                    data.decode("utf-8", "replace").encode("utf-16"),
                    b"\0" * 100,
                    b"[" * 100_000,
                    b"{}",
                    b"[]",
                    b"null",
                ]
            )
        )
    )


def change_kind(draw, path):
    """Put something else in a file's place."""
    kind = draw(st.sampled_from(KINDS))
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path has 107 bytes at most
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "two":
        other = path.with_name("other")
        other.unlink(missing_ok=True)
        path.symlink_to(other)
        other.symlink_to(path)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(3 << 30)  # takes no room
    elif kind == "self":
        path.symlink_to(path.parent)
    elif kind != "none":
        path.symlink_to({"dangling": "nowhere"}.get(kind, f"/dev/{kind}"))


def change_header(draw, path):
    """Change the header of a safetensors file: 8 bytes of its size, then JSON."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    what = draw(st.sampled_from(["json", "size", "many", "rename", "dtype", "shape", "offsets"]))
    name = draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    if what == "json":
        scratch = path.with_name("header")
        scratch.write_text(json.dumps(header))
        change_json(draw, scratch)
        text = scratch.read_bytes()
        scratch.unlink()
    else:
        if what == "many":
            count = draw(st.sampled_from([1000, 20_000, 200_000]))
            tiny = {"dtype": "F32", "shape": [0], "data_offsets": [len(rest), len(rest)]}
            header |= {f"t{i}": tiny for i in range(count)}
        elif what == "rename":
            header[draw(st.sampled_from(["", "a" * 5000, "\n", "model." + name]))] = header.pop(
                name
            )
        elif what == "dtype":
            header[name]["dtype"] = draw(
                st.sampled_from(["F64", "I32", "F8_E4M3", "BOOL", "F4", 3])
            )
        elif what == "shape":
            header[name]["shape"] = draw(
                st.lists(st.sampled_from([0, 1, 32, 64, 2**40]), max_size=4)
            )
        elif what == "offsets":
            header[name]["data_offsets"] = draw(st.lists(st.integers(0, 2**64), max_size=3))
        text = json.dumps(header).encode()
    if what == "size":
        size = draw(st.sampled_from([0, 1, size - 1, size + 1, 2**20, 2**40, 2**63, 2**64 - 1]))
    else:
        size = len(text)
    path.write_bytes(
        struct.pack("<Q", size) + text + rest
        if what != "size"
        else struct.pack("<Q", size) + data[8:]
    )


def change_tokenizer(draw, path):
    values = json.loads(path.read_text())
    what = draw(st.sampled_from(["rule", "rule", "id", "added", "model", "json"]))
    if what == "rule":
        key, value = draw(st.sampled_from(TOKENIZERS))
        values[key] = value
    elif what == "id":
        values["model"]["vocab"]["zzzq"] = draw(st.sampled_from(VOCABULARY_IDS))
    elif what == "added":
        token = copy.deepcopy(values["added_tokens"][0])
        token["id"] = draw(st.sampled_from([*VOCABULARY_IDS, 5, 1024]))
        token["content"] = draw(st.sampled_from(["qq", "", "a", "q" * 2_000_000, "\0", "<think>"]))
        token["normalized"] = draw(st.booleans())
        values["added_tokens"].append(token)
    elif what == "model":
        key = draw(st.sampled_from([*values["model"], "type"]))
        values["model"][key] = draw(VALUES | st.sampled_from(["Unigram", "WordLevel", "WordPiece"]))
    write_raw(path, values)
    if what == "json":
        change_json(draw, path)


def rehash(folder):
    """Make an artifact's manifest agree with its files, as a hostile one's does."""
    path = folder / "embedport.json"
    if path.stat().st_size >= LARGE:
        return  # it was changed itself, and to read it as text takes 20 seconds
    try:
        manifest = json.loads(path.read_text())
        for name, record in manifest["files"].items():
            file = folder / name
            if file.is_file() and file.stat().st_size < LARGE:
                data = file.read_bytes()
                record |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.write_text(json.dumps(manifest))
    except BROKEN:
        pass  # it was changed itself


def mutate(draw, folder):
    """Change one file of a folder, or put one there."""
    files = small_files(folder)
    shards = [path for path in files if path.suffix == ".safetensors"]
    files = [path for path in files if path not in shards]
    kinds = ["json"] * 8 + ["tokenizer"] * 4 + ["kind"] * 3 + ["bytes"] * 2 + ["new"]
    what = draw(st.sampled_from(kinds + ["header"] * 3 * bool(shards)))
    if what == "json":
        path = draw(st.sampled_from([path for path in files if path.name != "tokenizer.json"]))
        change_json(draw, path)
    elif what == "bytes":
        change_bytes(draw, draw(st.sampled_from(files + shards)))
    elif what == "kind":
        change_kind(draw, draw(st.sampled_from(files + shards)))
    elif what == "header":
        change_header(draw, draw(st.sampled_from(shards)))
    elif what == "tokenizer":
        change_tokenizer(draw, folder / "tokenizer.json")
    elif what == "new":
        name = draw(st.sampled_from(NEW))
        write_raw(folder / name, draw(VALUES | st.just({"weight_map": {"a": "b" * 5000}})))


def work(verb, folder, output):
    """Do what a user would; an error of ours is fine, any other one is raised.

    Returns:
        The error's class, or "good".
    """
    if verb == "inspect":
        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", ["embedport", "inspect", str(folder)])
            with pytest.raises(SystemExit) as ended:
                main()
        said = out.getvalue() + err.getvalue()
        assert "this is a bug" not in said
        assert "Traceback" not in said
        said.encode()
        return f"exit code {ended.value.code or 0}"
    try:
        if verb == "export":
            embedport.export(folder, output)
            return "good"
        model = embedport.load(folder, device="cpu")
        if isinstance(model, embedport.Embedder):
            model.encode(["a text about tea", ""], prompt="")
        else:
            model.score([("tea", "a leaf"), ("", "")])
    except EmbedportError as error:
        return type(error).__name__
    return "good"


@contextlib.contextmanager
def limits():
    """Fail what takes too long or too much memory."""

    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s of work, or {WAIT} s")

    before = memory("VmRSS")
    # Beyond that the process alone gets into difficulties, and not the machine.
    allowed = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 4 * MOST_MEMORY, allowed[1]))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    # Work is counted in the processor's time: the machine may have other work.
    handlers = {each: signal.signal(each, stop) for each in (signal.SIGALRM, signal.SIGPROF)}
    signal.alarm(WAIT)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, allowed)
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert memory("VmHWM") - before < MOST_MEMORY


def memory(key):
    """Bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


@seed(SEED)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # one or two changes are few enough
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_mutated_folders(originals, tmp_path_factory, data):
    draw = data.draw
    name = draw(st.sampled_from(sorted(originals)), "folder")
    verb = draw(st.sampled_from(["inspect"] * 3 + ["load"] * 4 + ["export"]), "verb")
    # It stays there for whoever looks for what ended the process.
    place = tmp_path_factory.getbasetemp() / "case"
    shutil.rmtree(place, ignore_errors=True)
    folder = Path(shutil.copytree(originals[name], place / name))
    for _ in range(draw(st.integers(1, 2), "changes")):
        with contextlib.suppress(*BROKEN):
            mutate(draw, folder)
    if (folder / "embedport.json").is_file():
        rehash(folder)
    with limits():
        event(f"{verb}: {work(verb, folder, place / 'out')}")
    left = {path.name for path in place.iterdir()}
    assert left <= {name, "out"}, left
