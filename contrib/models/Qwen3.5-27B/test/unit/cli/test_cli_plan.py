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
    def plan(self, tmp_path: Path, *arguments: str, longest: int = 2048, seq_len: int = 512) -> int:
        save_checkpoint(
            tmp_path / "checkpoint", max_position_embeddings=longest, linear_key_head_dim=128, linear_value_head_dim=128
        )
        return main(
            ["plan", "--model", str(tmp_path / "checkpoint"), "--tp", "2", "--seq-len", str(seq_len), *arguments]
        )

    def test_json_says_what_is_modelled_and_where_each_figure_is_from(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.plan(tmp_path, "--json", "--batch", "3", "--prompt-bucket", "256") == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["slots"], printed["prompt_rows"], printed["prompt_bucket"]) == (3, 1, 256)
        ours, whole = printed["this_model"], printed["layout_of_published_ports"]
        assert ours["fits"] and ours["longest_context"] == 2048 and ours["total"] < whole["total"]
        assert set(ours["modelled"]["ttft_s"]) == {"256", "512"}
        assert "heads of 256 dims" in printed["step_by_part"]["not_modelled"]
        assert all(figure["source"] for figure in printed["figures"])
        assert [b["bucket"] for b in printed["programs_modelled"]] == [256, 512, 512]

    def test_drafts_are_planned_with_the_acceptance_that_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        drafts = ("--speculate", "2", "--acceptance", "0.5", "--json")
        assert self.plan(tmp_path, *drafts, longest=256, seq_len=256) == 0
        printed = json.loads(capsys.readouterr().out)["this_model"]
        found = printed["modelled"]["speculation"]
        assert found["acceptance_once_those_before_are"] == [0.5, 0.5]
        assert found["tokens_per_step"] == 1.75
        for context in ("0", "256"):
            step = found["verification_s"][context] + found["draft_s"][context]
            assert found["tpot_s"][context] == pytest.approx(step / 1.75)
            assert found["break_even_batch"][context] >= 0
        assert printed["weights"]["mtp"] > 0 and printed["speculation"] > 0

    def test_the_table_says_what_drafts_cost_and_give(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        drafts = ("--speculate", "3", "--acceptance", "0.85", "0.75", "0.65")
        assert self.plan(tmp_path, *drafts, longest=256, seq_len=256) == 0
        table = capsys.readouterr().out
        assert "drafts: 3 a step, accepted with 0.85, 0.75, 0.65 once those before are: 2.90 tokens a step" in table
        for label in ("weights: MTP head", "verified tokens", "of KV cache, the MTP head's", "verify, 0 in the cache"):
            assert re.search(rf"  {label} +[\d.]+", table), label
        assert self.plan(tmp_path, longest=256, seq_len=256) == 0
        assert not re.search("MTP|verif|draft", capsys.readouterr().out)

    @pytest.mark.parametrize("share", ["1.1", "-0.1", "nan", "much"])
    def test_a_share_is_from_0_to_1(self, share: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["plan", "--speculate", "1", f"--acceptance={share}"])
        assert "--acceptance" in capsys.readouterr().err

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
            (("--speculate", "3"), ("--speculate 3 with 0 values of --acceptance", "give one share, or 3")),
            (("--speculate", "3", "--acceptance", "0.9", "0.8"), ("with 2 values", "give one share, or 3")),
            (("--acceptance", "0.9"), ("--speculate 0 with 1 values of --acceptance", "name K with --speculate")),
            (("--speculate", "9", "--acceptance", "0.9"), ("num_speculative_tokens=9", "0..7")),
            (("--speculate", "-1"), ("num_speculative_tokens=-1", "0..7")),
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
