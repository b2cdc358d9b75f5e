# SPDX-License-Identifier: Apache-2.0
"""benchmarks/README.md and its picture show the figures of the results; how results become tables."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import report, report_picture
from benchmarks.report import BEGIN, END

MACHINE = {"device": "cpu", "devices": 1, "backend": "cpu"}


def result(**content: Any) -> dict[str, Any]:
    git = {"commit": "0123456789abcdef", "dirty": False}
    return {"date": "2026-01-02T03:04:05+00:00", "git": git, "machine": MACHINE, "processor": "A CPU"} | content


def compared(speeds: dict[str, float], *, mix: str = "fixed", ttft: float = 1.5, streams: int = 8) -> dict[str, Any]:
    """jaxserve, and peers against which it is so many times as fast."""
    settings = {"model": "demo", "mix": mix, "prompt": 64, "new": 32, "rounds": 3, "servers": ["jaxserve", *speeds]}
    base = {"streams": streams, "ttft_p50_ms": 10.0, "failed": 0}
    rows = [base | {"server": "jaxserve", "tokens_per_second": 1000.0, "speedup": None, "ttft_ratio": None}]
    rows += [
        base | {"server": name, "tokens_per_second": 1000 / speed, "speedup": speed, "ttft_ratio": ttft}
        for name, speed in speeds.items()
    ]
    return result(settings=settings, same=dict.fromkeys(["jaxserve", *speeds], 1.0), rows=rows)


def section_of(root: Path, files: dict[str, dict[str, Any]]) -> str:
    """The section for these files of results/."""
    folder = root / "results"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return report.section(report.read(folder, root))


def cells(text: str, begins: str) -> list[str]:
    """The first row of a table that begins so."""
    [line] = [line for line in text.splitlines() if line.startswith(f"| {begins} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_readme_and_the_picture_are_up_to_date() -> None:
    assert report.main(["--check"]) == 0, "run python -m benchmarks.report"


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_text_between_the_markers_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section_of(tmp_path, {"a.json": compared({"vllm": 1.5})})
    readme, picture = tmp_path / "README.md", tmp_path / "pictures" / "performance.svg"
    readme.write_text(f"# before\n\n{BEGIN}\n99 times as fast\n{END}\n\nafter\n")
    assert report.main(["--check"], folder=tmp_path) == 1
    said = capsys.readouterr().err
    assert "README.md and performance.svg" in said and "run python -m benchmarks.report" in said
    assert "99 times" in readme.read_text() and not picture.exists()
    assert report.main([], folder=tmp_path) == 0
    text = readme.read_text()
    assert text.startswith(f"# before\n\n{BEGIN}\n## Results\n") and text.endswith(f"{END}\n\nafter\n")
    assert "99 times" not in text and "1.50" in text
    assert report.main(["--check"], folder=tmp_path) == 0
    picture.write_text("<svg/>")
    assert report.main(["--check"], folder=tmp_path) == 1 and "error: performance.svg" in capsys.readouterr().err


@pytest.mark.parametrize("readme", ["none\n", f"{END} {BEGIN}\n", f"{BEGIN}\n"])
def test_a_readme_without_markers_is_an_error(readme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert report.main([], folder=tmp_path) == 1
    assert "the README lacks" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == readme


def drawn(*files: dict[str, Any]) -> list[str]:
    """The texts of the picture of these results, newest first."""
    svg = report_picture.draw([(file["processor"], file) for file in files])
    assert svg
    return [text.text or "" for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_shows_the_newest_of_each_model_on_one_machine() -> None:
    new, old = compared({"vllm": 2.0, "llamacpp": 0.5}), compared({"vllm": 4.0})
    elsewhere = compared({"vllm": 8.0}) | {"processor": "Another CPU"}
    texts = drawn(new, elsewhere, old)
    assert texts[0] == "HTTP, demo model, 1.6 M parameters" and "8 streams" in texts
    assert {"1,000", "500", "2,000", "vLLM", "llama.cpp"} <= {*texts} and not {"250", "125"} & {*texts}
    assert "A CPU" in texts[-1] and "Another" not in texts[-1]


def test_the_picture_shows_what_a_prefix_cache_gives() -> None:
    texts = drawn(compared({"jaxserve-uncached": 4.0}, mix="shared"))
    assert {"1,000", "250", "64 tokens", "without prefix cache"} <= {*texts}


def test_there_is_no_picture_without_comparisons() -> None:
    assert report_picture.draw([("A CPU", result(rows=[]))]) is None


# --- what counts ----------------------------------------------------------------------------------------------------


def test_every_table_says_where_it_is_from(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.svg").touch()
    text = section_of(tmp_path, {"a.json": compared({"vllm": 1.5})})
    link = "[a.json](results/a.json) [svg](results/a.svg)"
    assert f"From {link}: 2026-01-02, commit 0123456, A CPU." in text
    changed = compared({"vllm": 1.5}) | {"git": {"commit": "abc", "dirty": True}}
    assert "commit abc with changes" in section_of(tmp_path, {"a.json": changed})


def test_the_newest_counts_for_each_peer(tmp_path: Path) -> None:
    old = compared({"vllm": 1.31, "transformers": 2.32})
    new = compared({"vllm": 1.43}) | {"date": "2026-01-03T00:00:00+00:00"}
    text = section_of(tmp_path, {"old.json": old, "new.json": new})
    assert "1.43" in text and "2.32" in text and "1.31" not in text
    assert "old.json" in text and "new.json" in text


def test_a_wholly_replaced_result_is_not_shown(tmp_path: Path) -> None:
    old, new = compared({"vllm": 1.31}), compared({"vllm": 1.43}) | {"date": "2026-01-03T00:00:00+00:00"}
    text = section_of(tmp_path, {"old.json": old, "new.json": new})
    assert "1.43" in text and "old.json" not in text


def test_machines_and_loads_stand_side_by_side(tmp_path: Path) -> None:
    here, there = compared({"vllm": 1.31}), compared({"vllm": 1.43}) | {"processor": "Another CPU"}
    shared = compared({"vllm": 1.65}, mix="shared")
    text = section_of(tmp_path, {"a.json": here, "b.json": there, "c.json": shared})
    assert all(shown in text for shown in ("1.31", "1.43", "1.65", "Another CPU"))


def test_missed_targets_are_marked_and_counted(tmp_path: Path) -> None:
    text = section_of(tmp_path, {"a.json": compared({"vllm": 1.19, "transformers": 2.0, "llamacpp": 0.5}, ttft=0.97)})
    marked = "0.97 **missed**"
    assert cells(text, "8") == ["8", "1,000", "10 ms", "1.19 **missed**", marked, "2.00", marked, "0.50", "0.97"]
    assert "Targets missed: 3," in text
    assert "Every target" in section_of(tmp_path, {"a.json": compared({"vllm": 1.2}, ttft=1.0)})
    assert "Targets missed: 1," in section_of(
        tmp_path, {"a.json": compared({"jaxserve-uncached": 2.9}, mix="shared", ttft=0.5)}
    )
    assert "Every target" in section_of(tmp_path, {"a.json": compared({"vllm": 1.0}, streams=64)})


def test_what_is_shown_decides_and_not_what_is_cut_off(tmp_path: Path) -> None:
    assert "Every target" in section_of(tmp_path, {"a.json": compared({"vllm": 1.1999}, ttft=0.9999)})


def own_settings(speeds: dict[str, list[float]], perplexity: dict[str, float | None]) -> dict[str, Any]:
    """Servers with their settings, each with its speed in three rounds and a TTFT of 10 ms."""
    settings = {"model": "/models/smol", "mix": "fixed", "prompt": 100, "new": 48, "rounds": 3, "streams": [1]}
    settings |= {"servers": [*speeds], "runs": {name: f"setting of {name}" for name in speeds}}
    rows = [
        {"server": name, "streams": 1, "tokens_per_second": sorted(those)[1], "ttft_p50_ms": 10.0, "failed": 0}
        | {"speeds": those, "ttfts_ms": [10.0, 10.0, 10.0]}
        for name, those in speeds.items()
    ]
    return result(settings=settings, same=dict.fromkeys(speeds, 0.5), rows=rows, perplexity=perplexity)


def test_servers_with_their_own_settings(tmp_path: Path) -> None:
    speeds = {
        "jaxserve:float32": [50.0, 50.0, 50.0],
        "jaxserve:bfloat16": [110.0, 240.0, 130.0],
        "jaxserve:int8": [190.0, 190.0, 190.0],
        "vllm": [100.0, 100.0, 100.0],
        "llamacpp:q8_0": [200.0, 200.0, 200.0],
    }
    perplexity = {"jaxserve:float32": 20.0, "jaxserve:bfloat16": 20.02, "jaxserve:int8": 20.2, "vllm": None}
    text = section_of(tmp_path, {"a.json": own_settings(speeds, perplexity)})
    assert "Model `smol`, fixed lengths, prompts of 100 words, answers of 48 tokens, 3 rounds, each server" in text
    setting = "setting of jaxserve:bfloat16"
    assert cells(text, "jaxserve:bfloat16") == ["jaxserve:bfloat16", setting, "20.02 (+0.10 %)", "130", "10 ms"]
    assert cells(text, "jaxserve:int8")[2] == "20.20 (+1.00 **missed** %)"
    assert cells(text, "jaxserve:float32")[2] == "20.00" and cells(text, "vllm")[2] == "-"
    assert cells(text, "llamacpp:q8_0")[2] == "-", "it has none"
    assert cells(text, "jaxserve:bfloat16 vs vllm")[1:] == ["1.2", "1.30", "1.00"], "the median of 1.1, 2.4 and 1.3"
    assert cells(text, "jaxserve:int8 vs vllm")[1:] == ["1.8", "1.90", "1.00"]
    assert cells(text, "jaxserve:int8 vs llamacpp:q8_0")[1:] == ["1.1 (0.9 at 1 stream)", "0.95", "1.00"]
    assert "Targets missed: 1," in text
    assert "identical to those of jaxserve:float32: jaxserve:bfloat16 50%," in text


def test_own_settings_and_float32_stand_side_by_side(tmp_path: Path) -> None:
    own = own_settings({"jaxserve": [1.0, 1.0, 1.0], "vllm": [1.0, 0.0, 1.0]}, {})
    own["settings"] |= {"model": "demo", "prompt": 64, "streams": [8]}
    own["rows"] = [row | {"streams": 8} for row in own["rows"]]
    text = section_of(tmp_path, {"new.json": own, "old.json": compared({"vllm": 1.31})})
    assert "1.31" in text and cells(text, "jaxserve vs vllm")[2] == "-", "a round in which all requests failed"
    assert drawn(compared({"vllm": 2.0}), own) == drawn(compared({"vllm": 2.0})), "the picture is of float32"


# --- kinds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warm", "missed"), [(4.9, False), (5.1, True)])
def test_start_up(warm: float, missed: bool, tmp_path: Path) -> None:
    phases = {"port": 0.5, "jax": 1.0, "load": 1.0, "compile": warm - 3.0, "rest": 0.5}
    content = result(model="model", rounds=2, flags=[], scale={}, starts={"cold": [phases], "warm": [phases, phases]})
    text = section_of(tmp_path, {"s.json": content})
    assert cells(text, "warm")[1] == f"{warm}" + " **missed**" * missed
    assert cells(text, "cold")[1] == f"{warm}"
    other = section_of(tmp_path, {"s.json": content | {"model": "llama-1b"}})
    assert "within 2 times the time of loading the weights, 2.0 s" in other and "**missed**" in cells(other, "warm")[1]


def test_the_server(tmp_path: Path) -> None:
    row = {"engine": 100.0, "server": 79.0, "kept": 0.79}
    row |= dict.fromkeys(("first_p50_ms", "added_first_p50_ms", "added_gap_p50_ms"), 1.0)
    text = section_of(tmp_path, {"s.json": result(rows=[row | {"streams": 1}, row | {"streams": 256}])})
    assert cells(text, "1")[3] == "0.79" and cells(text, "256")[3] == "0.79 **missed**"


def test_batching_and_memory(tmp_path: Path) -> None:
    peer = {"tokens_per_second": 10.0, "spread": 1.0, "speedup": 12.34, "timed": 64, "same": 1.0}
    base = {"tokens_per_second": 5000.0, "spread": 1.0}
    rows = [
        base
        | {"load": "chats", "requests": 1, "asked": 16, "peers": {"sequential": peer | {"timed": 16, "same": 0.97}}},
        base | {"load": "offline", "requests": 1000, "asked": 1000, "peers": {"sequential": peer, "static": peer}},
    ]
    memory = {"requests": 512, "max_model_len": 2048, "block_size": 16, "cache_bytes": 64_000_000, "steps": 9}
    memory |= {"preemptions": 0, "at_once_mean": 160.0, "at_once_most": 170, "at_once_reserved": 16}
    memory |= {"used_mean_bytes": 60e6, "used_most_bytes": 64_000_000, "tokens_mean": 1e4}
    memory |= {"reserved_mean_bytes": 600e6, "unused_percent": 4.0, "reserved_unused_percent": 90.0}
    content = result(model="demo", rounds=3, parts=["chats", "offline", "memory"], rows=rows, memory=memory)
    text = section_of(tmp_path, {"b.json": content})
    assert cells(text, "chats") == ["chats", "1", "5,000", "12.3 x", "all", "-", "-"]
    assert "At least 97% of the answers are identical" in text
    assert cells(text, "offline") == ["offline", "1,000", "5,000", *["12.3 x", "64 of 1,000"] * 2]
    tiny = section_of(tmp_path, {"b.json": content | {"model": "tiny"}})
    assert "chats" not in tiny, "toy sizes are not figures"
    assert cells(text, "MB in use, mean")[1:] == ["60.0", "600", "10.0 x"]


def test_the_host_s_work(tmp_path: Path) -> None:
    rows = [{"rows": count, "step_us": 1600.0, "row_us": 6.25} for count in (64, 256)]
    text = section_of(tmp_path, {"h.json": result(rows=rows, after=rows, ratio=1.2, served=[10, 10_000])})
    assert cells(text, "64")[1] == "1,600" and cells(text, "256")[1] == "1,600 **missed**"
    assert "takes 1.20 **missed** times as long" in text


def test_offline(tmp_path: Path) -> None:
    rows = [{"prompts": 1, "ours": 40.0, "ratio": 1.9, "aim": 2.0}, {"prompts": 2, "ours": 40.0, "ratio": None}]
    rows[1]["aim"] = None
    text = section_of(tmp_path, {"o.json": result(sides=[{}, {}], shape={}, rows=rows)})
    assert cells(text, "1")[2] == "1.90 **missed**" and cells(text, "2")[2] == "-"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "lacks its date"),
        ('{"rows": []}', "lacks its date"),
        (json.dumps(result(rows=[{"speed": 3}])), "has an unknown kind"),
        (json.dumps(result(settings={}, same={}, rows=[])), "lacks fields of its kind"),
    ],
)
def test_unusable_files_are_errors(content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "odd.json").write_text(content)
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    assert report.main([], folder=tmp_path) == 1
    printed = capsys.readouterr().err
    assert "odd.json" in printed and said in printed


# --- GPUs -----------------------------------------------------------------------------------------------------------


def gpu_section(name: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    machine = {"device": "NVIDIA H200", "devices": 1, "backend": "gpu"}
    content = result(section=name, about="what it is", complete=True, error=None, size="full", skipped=[], rows=rows)
    return content | {"machine": machine} | more


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    said = "Nothing has been measured on a GPU yet."
    tiny = gpu_section("machine", [], size="tiny")
    on_cpu = gpu_section("machine", [], machine=MACHINE)
    assert said in section_of(tmp_path, {"tiny/machine.json": tiny, "cpu/machine.json": on_cpu})
    assert said not in section_of(tmp_path, {"gpu/machine.json": gpu_section("machine", [])})


def test_sections_of_a_gpu(tmp_path: Path) -> None:
    steps = [
        {"case": "B=1", "ms": 4.5, "us": 4500.0, "floor_pct": 78.0, "target": ">=80 floor_pct", "met": False},
        {"case": "B=64", "ms": 6.5, "us": 6500.0, "floor_pct": 88.0, "target": ">=85 floor_pct", "met": True},
        {"case": "B=256", "skipped": "does not fit"},
    ]
    checks = [{"case": "a", "ok": True}, {"case": "b", "ok": False}]
    files = {
        "2026-01-02-h200/engine_decode.json": gpu_section("engine_decode", steps),
        "2026-01-02-h200/check_paged.json": gpu_section("check_paged", checks, skipped=["c", "d"]),
        "2026-01-02-h200/tuning.json": {"NVIDIA H200": {}},
        "2025-12-31-h200/check_paged.json": gpu_section("check_paged", [], date="2025-12-31T00:00:00+00:00"),
    }
    text = section_of(tmp_path, files)
    assert "NVIDIA H200:" in text and "2025-12-31" not in text
    assert cells(text, "engine_decode: what it is")[1:5] == ["3", "0", "1 of 2 **missed**", "1"]
    assert cells(text, "check_paged: what it is")[1:5] == ["2", "1", "-", "2"]
    assert cells(text, "B=1") == ["B=1", "4.5", "78", ">=80 floor_pct **missed**"]
    assert "| B=256 |" not in text
