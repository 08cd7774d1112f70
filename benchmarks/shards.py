"""What crosses processes when the vocabulary is spread over them: counted on gloo, and what that makes of a GPU's time.

    python benchmarks/shards.py [--rows 512] [--width 512] [--vocabulary 32000] [--output FOLDER]

Collectives and the bytes that each process puts into them, of one forward and backward, counted at torch.distributed's
own functions in 2 and 4 real processes. No seconds: two cores say nothing about a network. The estimate for GPUs is
arithmetic on the same counts, with the rates below, and measures nothing.

Writes FOLDER/shards-<machine>.json and prints its tables; `benchmarks/report.py` puts them into docs/benchmarks.md.
"""

import argparse
import uuid
from pathlib import Path
from tempfile import gettempdir

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from inputs import reasoning
from measuring import RESULTS, described, machine, write

from scsdpo_kernels import TopK, VocabShard, linear_divergence
from scsdpo_kernels.schedules.chunked import BUFFER_BYTES, MIN_ROWS

COUNTED = ("all_gather_single", "all_reduce", "reduce_scatter")
# Assumed of an H200: matrix products, one direction of NVLink 4, a 400 Gb/s network card, and a collective's latency.
FLOPS, NVLINK, NETWORK, LATENCY = 790e12, 450e9, 50e9, 30e-6
HEADS = {"Qwen3-8B": (151936, 4096), "Llama-3-70B": (128256, 8192)}
ROWS = 8192  # the estimate's


def cases(rows: int, vocabulary: int) -> dict[str, dict]:
    generator = torch.Generator().manual_seed(1)
    target = {"target_ids": torch.randint(vocabulary, (rows,), generator=generator)}
    return {
        "forward KL, β = 0": {"beta": 0.0},
        "Jensen-Shannon, β = 0.5": {},
        "Jensen-Shannon, target_ids, old_logp": {**target, "old_logp": torch.full((rows,), -10.0)},
        "TopK(100), bucket": {"support": TopK(100)},
        "Jensen-Shannon, 63 % of the weights 0": {"token_weight": (torch.arange(rows) % 100 >= 63).float()},
        "Jensen-Shannon, frozen backbone": {"frozen": True},
    }


def work(rank: int, processes: int, arguments: argparse.Namespace, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    hidden, weight, teacher = reasoning(arguments.rows, arguments.width, arguments.vocabulary)
    cut = [arguments.vocabulary * r // processes for r in range(processes + 1)]
    shard = VocabShard(cut[rank], cut[rank + 1])
    part = weight[cut[rank] : cut[rank + 1]].clone().requires_grad_()
    counted: list[tuple[str, int]] = []

    def counting(name: str):
        original = getattr(dist, name)

        def collective(*tensors, **options):
            own = tensors[0] if name == "all_reduce" else tensors[1]
            given = own if isinstance(own, list) else [own]
            counted.append((name, sum(x.nbytes for x in given)))
            return original(*tensors, **options)

        return collective

    for name in COUNTED:
        setattr(dist, name, counting(name))
    results = {}
    for name, options in cases(arguments.rows, arguments.vocabulary).items():
        counted.clear()
        frozen = options.pop("frozen", False)
        own = hidden.detach().requires_grad_(not frozen)
        linear_divergence(own, part, teacher, shard=shard, **options).loss.backward()
        results[name] = [list(x) for x in counted]
    if rank == 0:
        torch.save(results, f"{meeting}.results")
    dist.barrier()
    dist.destroy_process_group()


def measure(arguments: argparse.Namespace) -> list[dict]:
    measured = []
    for processes in (2, 4):
        meeting = f"{gettempdir()}/{uuid.uuid4().hex}"
        mp.spawn(work, (processes, arguments, meeting), nprocs=processes)
        for name, calls in torch.load(f"{meeting}.results").items():
            by_kind = {kind: [size for of, size in calls if of == kind] for kind in COUNTED}
            measured.append({"case": name, "processes": processes, "bytes": by_kind})
        Path(f"{meeting}.results").unlink()
    return measured


def estimate(vocabulary: int, width: int, processes: int, bandwidth: float) -> dict[str, float]:
    """Seconds of ROWS rows on each of so many GPUs, Jensen-Shannon, forward and backward."""
    longest = -(-vocabulary // processes)
    products = 4 * 2 * ROWS * width * longest / FLOPS
    chunk = max(MIN_ROWS, BUFFER_BYTES["gpu"] // (8 * longest))
    chunks = -(-ROWS // chunk)
    rows = ROWS * (processes - 1) * (56 + 32) / bandwidth + chunks * 2 * LATENCY
    hidden = 2 * (processes - 1) / processes * ROWS * width * 4 / bandwidth + LATENCY
    return {"bytes": (processes - 1) * 88 + 2 * (processes - 1) / processes * 4 * width, "products": products,
            "rows": rows, "hidden": hidden}  # fmt: skip


def table(result: dict) -> str:
    rows = result["rows"]
    lines = [
        f"N = {rows}, D = {result['width']}, V = {result['vocabulary']}, fp32, gloo, {described(result['machine'])}; "
        "of one process, forward and backward:",
        "",
        "| | processes | all-gathers | bytes a token in them | all-reduces | bytes a token in them |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["counted"]:
        gathers, reduces = row["bytes"]["all_gather_single"], row["bytes"]["all_reduce"]
        lines.append(
            f"| {row['case']} | {row['processes']} | {len(gathers)} | {sum(gathers) / rows:.0f} | {len(reduces)} | "
            f"{sum(reduces) / rows:.0f} |"
        )
    lines += [
        "",
        "| estimated, not measured | bytes a token to a GPU | four matmuls | scalars of tokens | hidden gradient |",
        "|---|---|---|---|---|",
    ]
    for name, (vocabulary, width) in HEADS.items():
        for processes, where, bandwidth in ((8, "NVLink", NVLINK), (64, "across nodes", NETWORK)):
            x = estimate(vocabulary, width, processes, bandwidth)
            lines.append(
                f"| {name}, {processes} GPUs, {where} | {x['bytes'] / 1024:.1f} KiB | {1e3 * x['products']:.2f} ms | "
                f"{100 * x['rows'] / x['products']:.1f} % of that | {100 * x['hidden'] / x['products']:.1f} % of that |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("rows", "width", "vocabulary")}
    result = {"machine": machine(torch.device("cpu")), **sizes, "counted": measure(arguments)}
    write("shards", result, arguments.output)
    print(table(result))


if __name__ == "__main__":
    main()
