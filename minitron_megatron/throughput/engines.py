"""Engines that run in a process of `work.py`: each loads a model and measures it. Imports wait until an engine is asked for."""

from collections.abc import Callable
from typing import Any

from minitron_megatron.throughput.work import Engine, Work, measure

Emit = Callable[[dict[str, Any]], None]


def megatron(work: Work, emit: Emit) -> None:
    """A model folder by megatron.core with its static key-value cache (models/generation.py), in any layout."""
    import torch
    import torch.distributed as dist

    from minitron_megatron.checkpoints.folder import open_model_folder
    from minitron_megatron.checkpoints.weights import load_model
    from minitron_megatron.config import ParallelConfig
    from minitron_megatron.models.build import build_model_chunks
    from minitron_megatron.models.generation import Sampling, generate
    from minitron_megatron.parallel.job import parallel_job
    from minitron_megatron.parallel.layout import Layout

    layout, folder = Layout.from_config(ParallelConfig(**work.parallel)), open_model_folder(work.folder)
    sampling = Sampling(max_new_tokens=work.output_length)
    with parallel_job(layout, seed=work.seed, device=work.device) as job:
        chunks = build_model_chunks(folder.shape, layout, getattr(torch, work.dtype), "auto")
        load_model(chunks, folder)

        def answer(prompts: list[list[int]]) -> int:
            answers = generate(chunks, layout, folder.shape, prompts, sampling, batch_size=len(prompts))
            return sum(map(len, answers))

        def memory() -> float:
            most = torch.tensor(_peak_gib(work.device), device=job.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            return most.item()

        measure(work, Engine(answer, memory, torch.cuda.synchronize, alone=layout.world_size == 1), emit)


def transformers(work: Work, emit: Emit) -> None:
    """A Hugging Face folder by `generate` of transformers, as it is by default, on one device."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        work.folder, dtype=getattr(torch, work.dtype), local_files_only=True, trust_remote_code=False
    )
    model = model.to(work.device).eval()
    # The folder's own may sample, and end early.
    model.generation_config = GenerationConfig(max_new_tokens=work.output_length, do_sample=False, pad_token_id=0)

    def answer(prompts: list[list[int]]) -> int:
        tokens = torch.tensor(prompts, device=work.device)
        answers = model.generate(tokens, attention_mask=torch.ones_like(tokens))
        return answers[:, work.input_length :].numel()

    wait = torch.cuda.synchronize if work.device == "cuda" else lambda: None
    measure(work, Engine(answer, lambda: _peak_gib(work.device), wait), emit)


def vllm(work: Work, emit: Emit) -> None:
    """A Hugging Face folder by vLLM's offline interface. Its memory is the share of the GPU that it takes, so it is not given."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=work.folder,
        skip_tokenizer_init=True,
        dtype=work.dtype,
        tensor_parallel_size=work.parallel["tensor"],
        pipeline_parallel_size=work.parallel["pipeline"],
        max_model_len=work.input_length + work.output_length,
        max_num_seqs=max(work.batches),
        # The prompts come again in every repeat.
        enable_prefix_caching=False,
        seed=work.seed,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=work.output_length, ignore_eos=True, detokenize=False)

    def answer(prompts: list[list[int]]) -> int:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return sum(len(done.outputs[0].token_ids) for done in model.generate(given, sampling, use_tqdm=False))

    measure(work, Engine(answer, lambda: None), emit)


def _peak_gib(device: str) -> float:
    """Most memory of tensors since the last call on a GPU; of the whole process since its start on a CPU."""
    if device == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    import torch

    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return most


ENGINES: dict[str, Callable[[Work, Emit], None]] = {"megatron": megatron, "transformers": transformers, "vllm": vllm}
