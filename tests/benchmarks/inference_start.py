"""What a compressed network costs before its first answer: resident memory, compilation, and loading.

Run `python -m tests.benchmarks.inference_start` (`make bench-inference_start`). Networks are quantized without data, by
one round of k-means; each is read in a new process of one thread. SmolLM2-135M, through transformers: memory beyond
that of a process that has run a small model of the same class, after writing 16 tokens; and by how much the first call
that uses the kernels is slower than the second one, where the plain path has run before. EfficientNet-Lite0,
entropy-coded: seconds of `load`; `--file` takes a file that was quantized before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import bgd_plugin as bgd

_MEMORY = """
import ctypes, gc, re, sys, time, torch, transformers, bgd_plugin
from bgd_plugin import kernels
bgd_plugin.load_adapter("transformers")
torch.set_num_threads(1); torch.set_grad_enabled(False)
tokens = torch.arange(8)[None]
def write(model):
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False, pad_token_id=0)
    return model.generate(tokens, **options)
def resident(field):
    gc.collect(); ctypes.CDLL(None).malloc_trim(0)
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(field + r":\\s+(\\d+)", status)[1])
def seconds(call):
    start = time.perf_counter(); call(); return time.perf_counter() - start
sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
write(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval())
before = {field: resident(field) for field in ("RssAnon", "VmRSS")}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
write(model)
after = {field: resident(field) for field in before}
print({"file": int(sys.argv[2]), **{f"{field} added": after[field] - before[field] for field in before}})
"""
_COMPILATION = (
    _MEMORY.split("before =")[0]
    + """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with kernels.disabled():
    model(tokens), model(tokens[:, :1])
for name, own in (("8 tokens", tokens), ("1 token", tokens[:, :1])):
    first, second = seconds(lambda: model(own)), seconds(lambda: model(own))
    print(f"{name}: first call {first:.3f} s, second {second:.3f} s, compilation {first - second:.3f} s")
"""
)
_LOADING = """
import sys, time, torch, bgd_plugin
from tests.benchmarks.peers.subjects import network
torch.set_num_threads(1)
like = network().eval()
for _ in range(2):
    start, cpu = time.perf_counter(), time.process_time()
    bgd_plugin.load(sys.argv[1], like=like)
    print(f"load: {time.perf_counter() - start:.2f} s, {time.process_time() - cpu:.2f} CPU-s")
"""


def _elsewhere(script: str, *arguments: object) -> None:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def language_model(folder: Path) -> None:
    """Memory and compilation of SmolLM2 at blocks of 4."""
    from tests.benchmarks.smollm2 import network

    config = bgd.BGDConfig(linear=bgd.LayerConfig(block_size=4), max_divergence=None, em_iterations=1)
    adapter = bgd.load_adapter("transformers")
    adapter.quantize_pretrained(network()[0], None, config, progress=False).model.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for script in (_MEMORY, _COMPILATION):
        _elsewhere(script, folder, size)


def coded_network(file: Path) -> None:
    """Loading of an entropy-coded EfficientNet-Lite0, of 1.705 MB if there is no file yet."""
    from tests.benchmarks.peers.subjects import network

    if not file.exists():
        config = bgd.BGDConfig(codes="entropy", target_bytes=1_705_000, freeze_norms=True, max_divergence=None)
        bgd.save(bgd.quantize_weights(network().eval(), config).model, file)
    print(f"{file.stat().st_size:,} bytes", flush=True)
    _elsewhere(_LOADING, file)


def main() -> None:
    """Print what each network costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="+", default=["smollm2", "lite0"], choices=["smollm2", "lite0"])
    parser.add_argument("--file", type=Path, help="an entropy-coded EfficientNet-Lite0")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "smollm2" in options.subjects:
            language_model(Path(folder))
        if "lite0" in options.subjects:
            coded_network(options.file or Path(folder) / "lite0.safetensors")


if __name__ == "__main__":
    main()
