"""The bench for a GPU, in tiny sizes on this machine: every part comes out, and its values are sane."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from persodpo.files import PROJECT


@pytest.mark.slow
def test_every_part_of_the_gpu_bench_comes_out(tmp_path):
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--quick",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--output",
        tmp_path,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads((tmp_path / "train-cuda.json").read_text())
    parts = [content[name] for name in ("packing", "ladder", "training")]
    assert [row["error"] for part in parts for row in part.values() if "error" in row] == []

    assert len(content["packing"]) == 8 * 2 * 2
    for key, row in content["packing"].items():
        if key.startswith("Gemma 2") and key.endswith("sdpa"):
            assert row["refused"].startswith("transformers: ")
            continue
        assert row["grouped"] is not key.startswith("LFM2"), key
        assert row["difference"] <= row["tolerance"], key
        assert row["apart"] < (1e-3 if "float32" in key else 1.0), key
        assert (row["rounding"] > 1e-3) is ("bfloat16" in key), key

    ladder, figures = content["ladder"], content["figures"]
    assert list(ladder) == list(figures) == ["grouped-128", "tuned-14", "trl"]
    assert {row["pairs"] for row in ladder.values()} == {56}
    assert ladder["trl"]["positions"] == ladder["trl"]["pairwise_tokens"] == ladder["grouped-128"]["pairwise_tokens"]
    assert ladder["grouped-128"]["positions"] < ladder["trl"]["positions"] / 5
    for name, row in ladder.items():
        assert len(row["seconds"]) == 1
        assert row["positions"] <= row["computed"] < 1.3 * row["positions"], name
        assert (row["reference_seconds"] > 0) is (name != "trl")
    assert figures["trl"]["against_trl"] == figures["tuned-14"]["against_tuned"] == 1
    assert figures["grouped-128"]["against_trl"] > 1

    assert len(content["training"]) == 4
    for key, row in content["training"].items():
        assert len(row["tuned"]) == len(row["grouped"]) == 6
        assert max(row["grouped"]) - min(row["grouped"]) > 0.01, key
        assert row["apart"] < (1e-3 if "float32" in key else 0.02), key

    table = (tmp_path / "train-cuda.md").read_text()
    assert done.stdout.strip() == table.strip()
    assert table.count("\n| ") == 3 * 2 - 1 + sum(map(len, parts))
    assert "Goals of the fastest grouped rung: 10x trl: " in table
