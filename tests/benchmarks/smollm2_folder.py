"""A language model as its users have it: quantized, saved, read in a new process, generating, trained, resumed.

Run `python -m tests.benchmarks.smollm2_folder` (`make bench-smollm2_folder`). SmolLM2-135M-Instruct goes through
`quantize_pretrained` at blocks of 4 and codebooks of 256, fitted to a few lines of text: this is about folders and
bits, not about quality. Each line that is printed was checked; what differs is an error. `--layers N` takes the first N
of its 30 layers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bgd_plugin as bgd
from bgd_plugin import kernels
from bgd_plugin.integration import PQModule
from tests.adapters.transformers.files import content
from tests.benchmarks.smollm2 import network

__all__ = ["main"]

_TEXT = (
    "Trained networks are large, and the devices that they are to run on are small. Product quantization cuts each row "
    "of a weight into blocks of a few numbers, and replaces each block by the nearest of a few hundred codewords. What "
    "has to be stored is a short code for each block, and the codewords. The codewords are chosen so that the outputs "
    "of a layer stay what they were on real inputs, rather than the weights themselves. "
)
_STEPS, _HALF = 20, 10


def said(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of a batch, and what the model goes on to say after its first tokens."""
    model.eval()
    torch.set_num_threads(1)
    with torch.no_grad(), kernels.disabled():  # the plain path gives the same bits in every process
        prompt = batch["input_ids"][:, :8]
        tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return {"logits": model(**batch).logits, "tokens": tokens}


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Print a line, or stop with the names of what differs."""
    other = [name for name, value in wanted.items() if not torch.equal(found[name], value)]
    if other or set(found) != set(wanted):
        raise SystemExit(f"{what}: {len(other)} of {len(wanted)} differ, {other[:3]}")
    print(f"{what}: {len(wanted)} equal, bit for bit ({time.process_time():.0f} CPU-s)", flush=True)


def read_elsewhere(folder: Path, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a new process says that reads the folder."""
    torch.save(batch, folder / "batch.pt")
    script = (
        "import sys, torch, transformers, bgd_plugin\n"
        "from tests.benchmarks.smollm2_folder import said\n"
        "bgd_plugin.load_adapter('transformers')\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(said(model, torch.load(sys.argv[1] + '/batch.pt')), sys.argv[1] + '/said.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
    result: dict[str, Tensor] = torch.load(folder / "said.pt")
    return result


def trained(model: Any, rows: list[dict[str, Tensor]], folder: Path, resume: Path | None = None) -> Any:
    """The model after 20 steps of `Trainer`, or after the last ten of them from a checkpoint."""
    import transformers

    settings = transformers.TrainingArguments(
        str(folder),
        max_steps=_STEPS,
        save_steps=_HALF,
        per_device_train_batch_size=1,
        learning_rate=1e-4,
        logging_steps=_STEPS,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, settings, train_dataset=rows)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


def codes(model: Any) -> dict[str, Tensor]:
    """The codes of each quantized layer."""
    return {path: m.codes.clone() for path, m in model.named_modules() if isinstance(m, PQModule)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    import transformers

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.smollm2_folder", description=__doc__)
    parser.add_argument("--layers", type=int, help="of the model; all unless given")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    adapter = bgd.load_adapter("transformers")
    model, tokenizer = network()
    if options.layers:
        model.model.layers = model.model.layers[: options.layers]
        model.config.num_hidden_layers = options.layers
    tokens = tokenizer(_TEXT, return_tensors="pt").input_ids[0]
    windows = tokens[: len(tokens) // 16 * 16].reshape(-1, 16)
    batch = {"input_ids": windows[:1]}
    rows = [{"input_ids": window, "labels": window} for window in windows]
    setting = {"block_size": 4, "codebook_size": 256}
    config = adapter.BGDQuantizationConfig(
        linear=setting, embedding=setting, max_divergence=None, method="em", em_iterations=3, batchnorm="keep"
    )
    result = adapter.quantize_pretrained(model, [{"input_ids": windows}], config, progress=False)
    del model
    print(f"{len(result.report.layers)} layers quantized ({time.process_time():.0f} CPU-s)", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = result.model
        small.save_pretrained(folder / "small")
        size = (folder / "small" / "model.safetensors").stat().st_size
        print(f"folder: {size:,} bytes; float {result.report.original_bytes:,}", flush=True)
        require_equal(read_elsewhere(folder / "small", batch), said(small, batch), "read in a new process")
        held = codes(small)
        trained(small, rows, folder / "one")
        require_equal(codes(small), held, "codes after 20 steps")
        small.save_pretrained(folder / "trained")
        require_equal(read_elsewhere(folder / "trained", batch), said(small, batch), "trained, read in a new process")
        again = transformers.AutoModelForCausalLM.from_pretrained(folder / "small")
        again.save_pretrained(folder / "same")
        files = [content(folder / one / "model.safetensors") for one in ("small", "same")]
        if files[0] != files[1]:
            raise SystemExit("a folder that was only read is saved with other content")
        print("read and saved: the same bytes", flush=True)
        trained(again, rows, folder / "two", resume=folder / "one" / f"checkpoint-{_HALF}")
        require_equal(dict(again.state_dict()), dict(small.state_dict()), "resumed after 10 steps")


if __name__ == "__main__":
    main()
