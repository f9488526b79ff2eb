"""`embedport check`: what it prints, and its exit codes."""

import json
import shutil
from dataclasses import replace

import numpy as np

from embedport.artifact.folder import write_manifest
from embedport.artifact.manifest import Manifest
from embedport.artifact.witness import WITNESS, read_witness, write_witness

WITNESSES = True


def test_the_same_vectors(run, folders):
    for task, noun in (("embedding", "vectors"), ("reranker", "scores")):
        code, out, err = run("check", folders / task, "--device", "cpu")
        assert (code, err) == (0, "")
        assert f"the same {noun} as on " in " ".join(out.split())


def test_json(run, folders):
    code, out, _ = run("check", folders / "embedding", "--device", "cpu", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["passed"]
    assert found["min_cosine"] >= found["limit"] == 0.9999999
    assert found["exported"] == found["here"]


def test_exit_codes(run, folders, tmp_path):
    folder = shutil.copytree(folders / "embedding", tmp_path / "artifact")
    manifest = Manifest.from_json(folder / "embedport.json")
    witness = read_witness(folder / WITNESS)
    write_witness(folder / WITNESS, replace(witness, results=np.roll(witness.results, 1, axis=0)))
    write_manifest(folder, manifest, folder.name)
    code, out, _ = run("check", folder)
    assert code == 1
    assert "not the same vectors" in " ".join(out.split())
    (folder / WITNESS).unlink()
    write_manifest(folder, manifest, folder.name)
    code, _, err = run("check", folder)
    assert code == 2
    assert "export it again" in err
    assert run("check", tmp_path / "nothing")[0] == 2
