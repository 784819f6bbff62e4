"""bench/replacing.py runs from end to end, at sizes that take no time."""

import sys

import replacing


def test_it_compares_and_prints_each_target(monkeypatch, capsys):
    monkeypatch.setattr(replacing, "SIZES", {name: (1, 4, 16, 2) for name in replacing.SIZES})
    monkeypatch.setattr(sys, "argv", ["replacing.py", "--budget", "0.01"])
    status = replacing.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("(at most")[0].split()[-1] for line in lines[-3:]] == ["us"] * 3
    assert status == int(any("missed" in line for line in lines))
