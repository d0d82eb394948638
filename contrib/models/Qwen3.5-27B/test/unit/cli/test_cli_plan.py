# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 plan`: its table, its JSON, its pictures and its errors."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from qwen35.cli import main
from qwen35.cli.plan_report import as_table, recommended_as_markdown, write_png
from support.applications import needs_stand_ins, of_27b_at_256k, plan_of_256k
from support.models import save_checkpoint

MODEL_ROOT = Path(__file__).parents[3]


@pytest.mark.usefixtures("backend")
class TestCommand:
    def plan(self, tmp_path: Path, *arguments: str) -> int:
        save_checkpoint(
            tmp_path / "checkpoint", max_position_embeddings=2048, linear_key_head_dim=128, linear_value_head_dim=128
        )
        return main(["plan", "--model", str(tmp_path / "checkpoint"), "--tp", "2", "--seq-len", "512", *arguments])

    def test_json_says_what_is_modelled_and_where_each_figure_is_from(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.plan(tmp_path, "--json", "--batch", "3", "--prompt-bucket", "256") == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["slots"], printed["prompt_rows"], printed["prompt_bucket"]) == (3, 1, 256)
        ours, whole = printed["this_model"], printed["layout_of_published_ports"]
        assert ours["fits"] and ours["longest_context"] == 2048 and ours["total"] < whole["total"]
        assert set(ours["modelled"]["ttft_s"]) == {"256", "512"}
        assert all(figure["source"] for figure in printed["figures"])
        assert [b["bucket"] for b in printed["programs_modelled"]] == [256, 512, 512]

    def test_a_picture_is_drawn(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("matplotlib")
        assert self.plan(tmp_path, "--png", str(tmp_path / "plan.png")) == 0
        assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert "trn2.3xlarge, tp_degree=2, LNC=2, bfloat16: 1 x 512 tokens" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--tp", "3"), ("tp_degree=3", "1, 2, 4, 8, 16")),
            (("--tp", "16"), ("tp_degree=16 exceeds the 4 logical cores", "1, 2, 4")),
            (("--seq-len", "300000"), ("seq_len=300000", "262144")),
            (("--batch", "0"), ("batch_size=0", "positive")),
            (("--model", "/nowhere"), ("/nowhere", "config.json")),
        ],
    )
    def test_errors_name_the_value_and_the_remedy(
        self, arguments: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["plan", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("qwen35: error:") and not captured.out
        assert all(word in captured.err for word in words)


@needs_stand_ins
class TestReport:
    def test_the_table_shows_both_layouts_and_where_its_figures_are_from(self) -> None:
        table = as_table(plan_of_256k())
        assert re.search(r"KV cache +4\.297 +17\.188\n", table)
        assert re.search(r"weights: DeltaNet +2\.781 +11\.124\n", table)
        assert re.search(r"fits +yes +NO\n", table)
        assert re.search(r"longest context at batch 1 +262,144 ", table)
        assert all(word in table for word in ("modelled", "trainium2.rst", "inferred"))

    def test_a_picture_without_matplotlib_says_how_to_get_it(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ValueError, match=r"pip install 'qwen35-neuron\[plot\]'"):
            write_png(of_27b_at_256k(), plan_of_256k(), tmp_path / "plan.png")

    def test_the_readme_shows_the_recommended_configurations_as_they_are(self) -> None:
        assert recommended_as_markdown() in (MODEL_ROOT / "docs" / "what_fits.md").read_text()
