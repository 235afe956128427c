"""Tests, accuracy, time and memory of K-FAC on an accelerator, in one command of nine minutes.

    python scripts/accelerator_check.py --out FILE [--device cuda|cpu] [--small] [--only PHASE ...]

Phases: ``environment``; ``tests`` (those marked ``gpu``); ``accuracy`` (factors, own gradients and
natural gradients on the device against float64 on the host, by models with dense layers, tied
heads and experts); ``timings`` (a plain pass against collect, factor and apply, interleaved);
``memory`` (peaks above the model). Everything comes from seeds, nothing is downloaded. The file is
written after every phase; one that fails leaves its error in it. ``--small`` rehearses the phases
with small shapes, on any device.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fisher_lab import KFACNaturalGradient  # noqa: E402

TEST_SECONDS = 150
ROUNDS = 5


def llama(width: int, layers: int, vocabulary: int) -> nn.Module:
    """A LLaMA with an untied head."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3 // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=max(width // 64, 2),
        num_key_value_heads=max(width // 64, 2), max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2(width: int, layers: int, vocabulary: int) -> nn.Module:
    """A GPT-2 with a tied head."""
    config = transformers.GPT2Config(
        n_embd=width, n_layer=layers, n_head=max(width // 64, 2), n_positions=4096,
        vocab_size=vocabulary, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def mixtral(width: int, layers: int, vocabulary: int) -> nn.Module:
    """A Mixtral with four experts, two of which see a token."""
    config = transformers.MixtralConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=4096,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def made(build: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """A model from a seed, without noise; there is no grouped product of experts in float64."""
    torch.manual_seed(0)
    model = build().eval().to(device=device, dtype=dtype)
    if dtype is torch.float64:
        model.set_experts_implementation("eager")  # type: ignore[operator]
    return model


def batch_of(vocabulary: int, rows: int, length: int, device: str) -> dict[str, Tensor]:
    """Random tokens; the last row is padded on its right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 2 * length // 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


class Check:
    """One run of the check.

    Args:
        device: ``cuda`` or ``cpu``.
        small: whether the shapes are those of a rehearsal.
    """

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = device, small

    # ---- environment and tests ---------------------------------------------------------------

    def environment(self) -> dict[str, Any]:
        """Versions, the device, and the switches that change its arithmetic."""
        found: dict[str, Any] = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": self.device,
            "small": self.small,
            "threads": torch.get_num_threads(),
        }
        if self.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "name": properties.name,
                "gib": round(properties.total_memory / 2**30, 1),
                "cuda": torch.version.cuda,
                "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
                "linalg": str(torch.backends.cuda.preferred_linalg_library()),
            }
        return found

    def tests(self) -> dict[str, Any]:
        """The tests marked ``gpu``, in a process of their own."""
        command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"]
        command += ["-m", "gpu", "tests/curvature/kfac"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        lines = done.stdout.strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        closing = re.sub(r" in [0-9.]+s.*$", "", lines[-1]) if lines else done.stderr[-400:]
        return {"exit": done.returncode, "closing": closing, "failed": failed}

    # ---- accuracy ----------------------------------------------------------------------------

    def accuracy(self) -> dict[str, Any]:
        """Largest relative errors over the layers, on the device against float64 on the host."""
        width = 32 if self.small else 256
        rows = {}
        for build in (llama, gpt2, mixtral):
            for length in (24,) if self.small else (48, 384):
                batch = batch_of(512, 3, length, "cpu")
                tokens = int(batch["attention_mask"].sum())
                errors = self._errors(partial(build, width, 2, 512), batch)
                rows[f"{build.__name__}, {tokens} tokens"] = errors
        return rows

    def _errors(self, build: Callable[[], nn.Module], batch: dict[str, Tensor]) -> dict[str, Any]:
        host = made(build, "cpu", torch.float64)
        exact = self._factors(host, batch, verify=True)
        there = {name: value.to(self.device) for name, value in batch.items()}
        found: dict[str, Any] = {"layers": len(exact.kfac_factors), "coverage": 0.0}
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            model = made(build, self.device, dtype)
            kfac = self._factors(model, there, verify=dtype is not torch.bfloat16)
            common = [n for n in exact.kfac_factors if n in kfac.kfac_factors]
            row: dict[str, Any] = {"layers": len(common)}  # rounding may send tokens to others
            for side in "AG":
                pairs = [
                    (getattr(kfac.kfac_factors[n], side), getattr(exact.kfac_factors[n], side))
                    for n in common
                ]
                row[side] = max(_error(f, e) for f, e in pairs if e is not None)
            row["own"] = _worst(kfac.own_gradients(model), exact.own_gradients(host))
            for damping in (1e-3, 1e-5):
                for engine in (exact, kfac):
                    engine.with_damping(damping, damping)
                given = exact.own_gradients(host)
                expected = exact.compute_natural_gradient(given, host)
                given = {n: g.to(self.device, dtype) for n, g in given.items()}
                row[f"natural {damping:g}"] = _worst(
                    kfac.compute_natural_gradient(given, model), expected
                )
            found[str(dtype).removeprefix("torch.")] = row
            found["coverage"] = kfac.coverage.share
        return found

    def _factors(
        self, model: nn.Module, batch: dict[str, Tensor], verify: bool
    ) -> KFACNaturalGradient:
        kfac = KFACNaturalGradient(damping=1e-3, track_diagonal=False)
        kfac.collect_kfac_factors(model, batch, keep_gradient=True, verify=verify)
        return kfac

    # ---- time and memory ---------------------------------------------------------------------

    def timings(self) -> dict[str, Any]:
        """Medians in milliseconds of the phases of K-FAC, and the ratio to the plain pass."""
        return {name: self._time(*case) for name, case in self._cases().items()}

    def memory(self) -> dict[str, Any]:
        """MiB above the model: of the plain pass, and of K-FAC's peak and of what it keeps."""
        if self.device != "cuda":
            return {"skipped": "the allocator's peak is known on CUDA only"}
        return {name: self._memory_of(*case) for name, case in self._cases().items()}

    def _memory_of(
        self, build: Callable[[], nn.Module], dtype: torch.dtype, batch: Any, options: Any
    ) -> dict[str, float]:
        gc.collect()  # the cases before this one have left cycles
        model = made(build, self.device, dtype)
        before = torch.cuda.memory_allocated()
        kfac = KFACNaturalGradient(track_diagonal=False, **options)

        def all_of_it() -> None:
            kfac.collect_kfac_factors(model, batch, keep_gradient=True)
            kfac.prepare_inverses()
            kfac.compute_natural_gradient(None, model)

        values = {"plain": self._peak(lambda: _plain(model, batch)) - before}
        values["peak"] = self._peak(all_of_it) - before
        values["kept"] = torch.cuda.memory_allocated() - before
        return {key: round(value / 2**20, 1) for key, value in values.items()}

    def _cases(self) -> dict[str, tuple[Callable[[], nn.Module], torch.dtype, Any, dict[str, Any]]]:
        if self.small:
            batch = batch_of(512, 2, 32, self.device)
            return {"small": (partial(llama, 64, 2, 512), torch.float32, batch, {"damping": 1e-3})}
        small = {"damping": 1e-3, "max_condition_number": 1e6}
        fast = {**small, "core_dtype": "float32", "apply_dtype": "float32"}
        large, text = 32000, 50257
        batches = {length: batch_of(text, 4, length // 4, self.device) for length in (512, 2048)}
        billion = batch_of(large, 4, 512, self.device)
        cases: dict[str, Any] = {}
        for length, batch in batches.items():
            for kind, options in (("float64", small), ("float32", fast)):
                cases[f"gpt2 124M, {length} positions, {kind} core"] = (
                    partial(gpt2, 768, 12, text), torch.float32, batch, options,
                )  # fmt: skip
        cases["llama 1.1B in bf16, 2048 positions, float32 core"] = (
            partial(llama, 2048, 20, large), torch.bfloat16, billion, fast,
        )  # fmt: skip
        return cases

    def _time(
        self, build: Callable[[], nn.Module], dtype: torch.dtype, batch: Any, options: Any
    ) -> dict[str, Any]:
        model = made(build, self.device, dtype)
        kfac = KFACNaturalGradient(track_diagonal=False, **options)
        gradients: dict[str, Tensor] = {}
        steps: dict[str, Callable[[], Any]] = {
            "plain": lambda: gradients.update(_plain(model, batch)),
            "collect": lambda: kfac.collect_kfac_factors(model, batch, keep_gradient=True),
            "factor": kfac.prepare_inverses,
            "apply own": lambda: kfac.compute_natural_gradient(None, model),
            "apply": lambda: kfac.compute_natural_gradient(gradients, model),
        }
        taken: dict[str, list[float]] = {name: [] for name in steps}
        rounds = ROUNDS if not self.small else 2
        for turn in range(rounds + 1):
            for name, step in steps.items():
                seconds = self._seconds(step)
                if turn:  # the first round warms up
                    taken[name].append(seconds)
        found = {name: round(1e3 * median(values), 2) for name, values in taken.items()}
        beyond = found["collect"] + found["factor"] + found["apply"]
        parameters = sum(p.numel() for p in model.parameters())
        return {
            "parameters": parameters, **found, "all over plain": round(beyond / found["plain"], 2),
        }  # fmt: skip

    def _seconds(self, step: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _peak(self, step: Callable[[], Any]) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()


def _plain(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A forward and a backward pass; the gradients of the mean loss."""
    loss = model(**batch, use_cache=False).loss
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return {name: g for (name, _), g in zip(model.named_parameters(), grads, strict=True)}


def _error(found: Any, expected: Any) -> float:
    """The relative error of a factor."""
    exact = expected.to_dense().double().cpu()
    return float((found.to_dense().double().cpu() - exact).norm() / exact.norm())


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter's gradient."""
    return max(
        float((found[n].double().cpu() - g.double().cpu()).norm() / g.double().cpu().norm())
        for n, g in expected.items()
        if float(g.norm()) > 0
    )


PHASES = ("environment", "tests", "accuracy", "timings", "memory")


def main() -> None:
    """Runs the phases and writes the file after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--small", action="store_true", help="small shapes, for a rehearsal")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=PHASES, metavar="PHASE")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for what is found")
    options = parser.parse_args()
    check, found = Check(options.device, options.small), {}
    failed = False
    for phase in options.only:
        start = time.perf_counter()
        try:
            result = getattr(check, phase)()
        except Exception as error:
            failed = True
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        seconds = round(time.perf_counter() - start, 1)
        found[phase] = {"seconds": seconds, "found": result}
        print(f"{phase}, {seconds} s:\n{json.dumps(result, indent=1)}", flush=True)
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(options.out)
    sys.exit(failed)


if __name__ == "__main__":
    main()
