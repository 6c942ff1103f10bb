"""`Trainer` and `Seq2SeqTrainer` on quantized models: train, evaluate, save, go on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

import transformers

import bgd_plugin as bgd
from bgd_plugin.errors import CheckpointError
from bgd_plugin.integration import PQModule
from tests.adapters.transformers.common import quantized
from tests.adapters.transformers.zoo import ZOO, answer

adapter: Any = bgd.load_adapter("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(3, 60, (10,), generator=generator), "labels": torch.tensor(i % 3)}
        for i in range(count)
    ]


def pairs(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (count, 16), generator=generator)
    return [{"input_ids": row[:10], "labels": row[10:]} for row in ids]


def arguments(folder: Path, kind: Any = transformers.TrainingArguments, **options: Any) -> Any:
    defaults: dict[str, Any] = {"report_to": [], "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-3}
    return kind(str(folder), **defaults | {"disable_tqdm": True, "max_steps": 2} | options)


def codes(model: Any) -> dict[str, Tensor]:
    return {path: module.codes.clone() for path, module in model.named_modules() if isinstance(module, PQModule)}


def test_codebooks_are_trained_and_codes_are_not(tmp_path: Path) -> None:
    model = quantized("bert")
    before, held = {k: v.clone() for k, v in model.named_parameters()}, codes(model)
    trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=rows(), eval_dataset=rows(4))
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {f"{path}.codebook" for path in held} <= moved
    assert all(torch.equal(value, held[path]) for path, value in codes(model).items())
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "trained"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert torch.equal(answer(again, ZOO["bert"]), answer(model.eval(), ZOO["bert"]))


def test_evaluation_and_prediction_alone(tmp_path: Path) -> None:
    model = quantized("bert")
    trainer = transformers.Trainer(model, arguments(tmp_path), eval_dataset=rows(4))
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows(4)).predictions.shape == (4, 3)


def test_sequence_to_sequence(tmp_path: Path) -> None:
    model = quantized("t5", embedding={"block_size": 4, "codebook_size": 16})
    settings = arguments(tmp_path, transformers.Seq2SeqTrainingArguments, predict_with_generate=True)
    trainer = transformers.Seq2SeqTrainer(model, settings, train_dataset=pairs(), eval_dataset=pairs(4))
    trainer.train()
    assert trainer.predict(pairs(4), max_new_tokens=3).predictions.shape[0] == 4
    assert model.lm_head.codebook is model.shared.codebook


def test_going_on_from_a_checkpoint_gives_what_one_run_gives(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "seed": 1}
    whole = quantized("bert")
    transformers.Trainer(whole, arguments(tmp_path / "one", **settings), train_dataset=rows()).train()
    second = quantized("bert")
    trainer = transformers.Trainer(second, arguments(tmp_path / "two", **settings), train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("shards", [False, True])
def test_a_checkpoint_of_another_quantized_model_is_refused(shards: bool, tmp_path: Path) -> None:
    quantized("bert", seed=5).save_pretrained(tmp_path / "other", **({"max_shard_size": "10KB"} if shards else {}))
    settings = arguments(tmp_path)
    transformers.TrainerState(train_batch_size=8).save_to_json(str(tmp_path / "other" / "trainer_state.json"))
    model = quantized("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = transformers.Trainer(model, settings, train_dataset=rows())
    with pytest.raises(CheckpointError, match=r"has other codes for layer 'bert\.encoder.*from_pretrained"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "other"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_with_other_sizes_is_refused(tmp_path: Path) -> None:
    quantized("bert", linear={"block_size": 8, "codebook_size": 16}).save_pretrained(tmp_path)
    model = quantized("bert")
    trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=rows())
    with pytest.raises(CheckpointError, match="has other codes"):
        trainer._load_from_checkpoint(str(tmp_path))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = quantized("qwen2", embedding={"block_size": 4, "codebook_size": 16})
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows()]
    settings = arguments(
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=10.0,
    )
    transformers.Trainer(model, settings, train_dataset=data, eval_dataset=data).train()
    best = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    last = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    found = answer(model.eval().to("cpu"), ZOO["qwen2"])
    assert any(torch.equal(found, answer(one, ZOO["qwen2"])) for one in (best, last))
