"""Deployments: what Triton would run gives encode's vectors; folders name what is in them."""

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml

import embedport
from embedport.cli import main
from embedport.deploy import deploy_docker, deploy_triton, deploy_vespa
from embedport.deploy.packages import deployment, open_artifact
from embedport.errors import ArtifactError, InputError
from embedport.strict_json import load_json

TEXTS = ["What is the capital of China?", "tea", "a " * 60, "日本語 🥾"]


@pytest.fixture(scope="module")
def folders(folders, checkpoints):
    embedport.export(checkpoints("kv2"), folders / "older", consumers=["triton"])
    return folders


class Triton:
    """A stand-in for Triton: tensors, requests, and the graph's model by its name."""

    def __init__(self, repository):
        self.repository, self.batches = repository, []
        self.modules = ModuleType("triton_python_backend_utils")
        triton = self

        class Tensor:
            def __init__(self, name, values):
                self.name, self.values = name, values

            def as_numpy(self):
                return self.values

        class InferenceRequest:
            def __init__(self, model_name, requested_output_names, inputs, preferred_memory):
                del preferred_memory
                self.model, self.outputs = model_name, requested_output_names
                self.feeds = {tensor.name: tensor.values for tensor in inputs}

            def exec(self):
                triton.batches.append(self.feeds["input_ids"].shape)
                path = triton.repository / self.model / "1" / "model.onnx"
                session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                found = session.run(self.outputs, self.feeds)
                tensors = [Tensor(*pair) for pair in zip(self.outputs, found, strict=True)]
                return SimpleNamespace(has_error=lambda: False, tensors=tensors)

        def find(holder, name):
            return next((tensor for tensor in holder.tensors if tensor.name == name), None)

        for name, value in {
            "Tensor": Tensor,
            "InferenceRequest": InferenceRequest,
            "InferenceResponse": lambda output_tensors, error=None: SimpleNamespace(
                tensors=output_tensors, error=error
            ),
            "TritonError": str,
            "PreferredMemory": lambda kind, index: (kind, index),
            "TRITONSERVER_MEMORY_CPU": 0,
            "get_input_tensor_by_name": find,
            "get_output_tensor_by_name": find,
        }.items():
            setattr(self.modules, name, value)

    def open(self, monkeypatch, name):
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", self.modules)
        path = self.repository / name / "1" / "model.py"
        spec = importlib.util.spec_from_file_location("model", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        parameters = {"graph": {"string_value": f"{name}-graph"}}
        model.initialize({"model_config": json.dumps({"parameters": parameters})})
        return model

    def request(self, **inputs):
        return SimpleNamespace(
            tensors=[
                self.modules.Tensor(name, np.array([[v.encode()] for v in values], object))
                for name, values in inputs.items()
            ]
        )


class TestTriton:
    @pytest.mark.parametrize("name", ["embedding", "older"])
    def test_vectors(self, folders, tmp_path, monkeypatch, name):
        deploy_triton(str(folders / name), tmp_path / "repository")
        triton = Triton(tmp_path / "repository")
        model = triton.open(monkeypatch, name)
        embedder = embedport.load_embedder(folders / "embedding", device="cpu")
        prompts = ["query", "document", "query", "query"]
        plain, prompted, wrong = model.execute(
            [
                triton.request(TEXT=TEXTS),
                triton.request(TEXT=TEXTS, PROMPT=prompts),
                triton.request(TEXT=["a"], PROMPT=["queri"]),
            ]
        )
        expected = embedder.encode(TEXTS)
        np.testing.assert_allclose(plain.tensors[0].values, expected, atol=1e-5)
        expected = [embedder.encode([t], prompt=p)[0] for t, p in zip(TEXTS, prompts, strict=True)]
        np.testing.assert_allclose(prompted.tensors[0].values, expected, atol=1e-5)
        assert "no prompt is named 'queri'" in wrong.error
        assert len(triton.batches) == 1

    def test_bytes_that_are_no_text(self, folders, tmp_path, monkeypatch):
        deploy_triton(str(folders / "embedding"), tmp_path / "repository")
        triton = Triton(tmp_path / "repository")
        request = triton.request(TEXT=["a"])
        request.tensors[0].values[0, 0] = b"\xff"
        (wrong,) = triton.open(monkeypatch, "embedding").execute([request])
        assert "TEXT should be UTF-8" in wrong.error
        assert not triton.batches

    def test_a_token_beyond_the_table(self, folders, tmp_path, monkeypatch):
        """A GPU would take zeros for its row."""
        deploy_triton(str(folders / "embedding"), tmp_path / "repository")
        triton = Triton(tmp_path / "repository")
        model = triton.open(monkeypatch, "embedding")
        model.manifest = replace(model.manifest, vocab_size=1)
        (wrong,) = model.execute([triton.request(TEXT=["tea"])])
        assert "text 0 holds token" in wrong.error
        assert not triton.batches

    def test_scores(self, folders, tmp_path, monkeypatch):
        deploy_triton(str(folders / "reranker"), tmp_path / "repository")
        triton = Triton(tmp_path / "repository")
        model = triton.open(monkeypatch, "reranker")
        reranker = embedport.load_reranker(folders / "reranker", device="cpu")
        queries = ["tea"] * len(TEXTS)
        (found,) = model.execute([triton.request(QUERY=queries, DOCUMENT=TEXTS)])
        expected = reranker.score(list(zip(queries, TEXTS, strict=True)))
        np.testing.assert_allclose(found.tensors[0].values[:, 0], expected, atol=1e-5)

    @pytest.mark.parametrize("task", ["embedding", "reranker"])
    def test_configurations(self, folders, tmp_path, task):
        pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")
        from google.protobuf import text_format

        deploy_triton(str(folders / task), tmp_path / "repository")
        configs = {}
        for path in (tmp_path / "repository").glob("*/config.pbtxt"):
            config = text_format.Parse(path.read_text(), pb.ModelConfig())
            assert config.name == path.parent.name
            configs[config.name] = config
        texts, graph = configs[task], configs[f"{task}-graph"]
        assert texts.parameters["graph"].string_value == graph.name
        assert {value.name for value in graph.input} == {"input_ids", "attention_mask"}
        for name, value in texts.model_warmup[0].inputs.items():
            data = (tmp_path / "repository" / task / "warmup" / value.input_data_file).read_bytes()
            assert int.from_bytes(data[:4], "little") == len(data) - 4
            assert name in {tensor.name for tensor in texts.input}


class TestDocker:
    def test_all_that_is_named_is_there(self, folders, tmp_path):
        wheel = tmp_path / "embedport-0.1.0-cp311-abi3-linux_x86_64.whl"
        wheel.write_bytes(b"")
        out = tmp_path / "service"
        deploy_docker([str(folders / "embedding"), str(folders / "reranker")], out, wheel)
        dockerfile = (out / "Dockerfile").read_text()
        for source in re.findall(r"^COPY (?!--from)(?:--\S+ )?(\S+) ", dockerfile, re.MULTILINE):
            assert (out / source).exists()
        command = json.loads(re.findall(r"^CMD (.*)$", dockerfile, re.MULTILINE)[-1])
        assert command == ["/models/embedding", "/models/reranker"]
        for model in command:
            artifact = embedport.Artifact.open(out / model[1:])
            assert artifact.manifest.task == model.rpartition("/")[2]
        service = yaml.safe_load((out / "compose.yaml").read_text())["services"]["embedport"]
        assert service["ports"] == ["127.0.0.1:8000:8000"]
        # Docker may put a proxy into the environment.
        assert re.search(r"^HEALTHCHECK (.*\n)+.*ProxyHandler\(\{\}\)", dockerfile, re.MULTILINE)
        # Files of umask 077 are their owner's alone.
        assert re.search(
            r"^COPY --chown=10001:10001 models .*\n(.*\n)*USER 10001$", dockerfile, re.M
        )
        # Docker Compose of 2022 fills in what looks like a variable in this message, too.
        assert service["environment"]["EMBEDPORT_API_KEY"].count("$") == 1

    def test_another_wheel(self, folders, tmp_path):
        with pytest.raises(InputError, match="should be embedport's wheel"):
            deploy_docker([str(folders / "embedding")], tmp_path / "out", tmp_path / "numpy.whl")


class TestVespa:
    def test_component(self, folders, tmp_path):
        deploy_vespa(str(folders / "embedding"), tmp_path / "app")
        component = ElementTree.parse(tmp_path / "app" / "services-part.xml").getroot()
        for tag in ("transformer-model", "tokenizer-model"):
            element = component.find(tag)
            assert element is not None
            assert (tmp_path / "app" / element.attrib["path"]).is_file()
        assert component.findtext("transformer-output") == "sentence_embedding"
        assert component.findtext("pooling-strategy") == "none"
        # Its space would come between the prompt and the text.
        assert component.find("prepend") is None
        assert "Query:YOUR TEXT" in (tmp_path / "app" / "README.md").read_text()

    def test_prompts_that_end_with_a_space(self, checkpoints, copied, tmp_path):
        source = copied(checkpoints("kv2"))
        prompts = {"query": "find <it>: ", "document": "text: "}
        path = source / "config_sentence_transformers.json"
        path.write_text(json.dumps(load_json(path) | {"prompts": prompts}))
        embedport.export(source, tmp_path / "model")
        deploy_vespa(str(tmp_path / "model"), tmp_path / "app")
        component = ElementTree.parse(tmp_path / "app" / "services-part.xml").getroot()
        assert component.findtext("prepend/query") == "find <it>:"
        assert component.findtext("prepend/document") == "text:"

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"form": "messages"}, "its inputs are chat messages"),
            ({"lower_case": True}, "its texts are lowercased first"),
            ({"truncation_side": "left"}, "its long texts are cut at the beginning"),
        ],
    )
    def test_what_it_does_not_do(self, folders, tmp_path, monkeypatch, inputs, message):
        name, artifact = open_artifact(str(folders / "embedding"))
        manifest = artifact.manifest
        manifest = replace(manifest, inputs=replace(manifest.inputs, **inputs))
        changed = (name, replace(artifact, manifest=manifest))
        monkeypatch.setattr("embedport.deploy.vespa.open_artifact", lambda model: changed)
        with pytest.raises(InputError, match=message):
            deploy_vespa(str(folders / "embedding"), tmp_path / "app")

    def test_the_graph_runs_beside_its_weights(self, folders, tmp_path):
        deploy_vespa(str(folders / "embedding"), tmp_path / "app")
        path = tmp_path / "app" / "models" / "embedding" / "model.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert next(iter(session.get_outputs())).name == "sentence_embedding"


def test_the_graph_for_older_versions_is_taken(folders, tmp_path):
    """Triton's and Vespa's onnxruntime cannot be chosen: 1.20 takes opset 21 at most."""
    deploy_triton(str(folders / "older"), tmp_path / "triton")
    deploy_vespa(str(folders / "older"), tmp_path / "vespa")
    for path in ("triton/older-graph/1", "vespa/models/older"):
        graph = onnx.load(tmp_path / path / "model.onnx", load_external_data=False)
        assert {entry.version for entry in graph.opset_import if not entry.domain} == {21}
    for readme in tmp_path.glob("*/README.md"):
        assert "onnxruntime>=1.20" in readme.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vespa", "{reranker}", "-o", "{here}/out"], "it is a reranker"),
        (["triton", "{checkpoint}", "-o", "{here}/out"], "is a checkpoint: deploy what"),
        (["triton", "{embedding}", "-o", "{here}"], "exists; choose another place"),
        (["triton", "{here}/none", "-o", "{here}/out"], "no such folder"),
    ],
)
def test_one_line(folders, checkpoints, tmp_path, monkeypatch, capsys, arguments, message):
    places = {"here": tmp_path, "checkpoint": checkpoints("kv2")}
    places |= {task: folders / task for task in ("embedding", "reranker")}
    filled = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["embedport", "deploy", *filled])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_artifact_that_is_replaced_while_it_is_copied(folders, tmp_path):
    folder = Path(shutil.copytree(folders / "embedding", tmp_path / "model"))
    change = deployment(tmp_path / "out", [embedport.Artifact.open(folder)])
    change.__enter__()
    shutil.rmtree(folder)
    shutil.copytree(folders / "embedding", folder)
    with pytest.raises(ArtifactError, match="was changed or replaced while"):
        change.__exit__(None, None, None)
    assert not (tmp_path / "out").exists()
