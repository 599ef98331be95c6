"""Train a small model on several processes, on one machine or on several.

    torchrun --nproc-per-node 2 -m examples.train_parallel --fsdp 2
    torchrun --nproc-per-node 4 -m examples.train_parallel --dp 2 --tp 2 --sequence-parallel

On two machines, the same on each, with the first one's address:

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500 \\
        --rdzv-id one -m examples.train_parallel --dp 2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import funcmodels as fm
from examples.hello import model

TEXT = Path(__file__).parent / "data" / "lighthouse.txt"


def main() -> None:
    args = arguments()
    sizes = {"dp": args.dp, "fsdp": args.fsdp, "tp": args.tp}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    module = fm.compile_to_torch(model, mesh, sequence_parallel=args.sequence_parallel)
    module.reset(seed=0)  # on the mesh's device

    documents = [list(text.encode()) for text in TEXT.read_text().split("\n\n")]
    packed = fm.pack(documents, length=128)
    rows = packed["tokens"].shape[0] // args.batch * args.batch
    # Ranks that share layers, along tp, have the same rows; along dp and fsdp, each has its own.
    replica = mesh.get_local_rank("dp") * args.fsdp + mesh.get_local_rank("fsdp")
    share = args.batch // (args.dp * args.fsdp)

    def batch(step: int) -> dict[str, torch.Tensor]:
        first = step * args.batch % rows + replica * share
        return {name: x[first : first + share].to(device) for name, x in packed.items()}

    fitted = fm.fit(
        module,
        module.weights(),
        batch,
        steps=args.steps,
        optimizer=fm.optim.adamw(3e-3),
        donate=True,
        progress=False,
    )
    held = sum(w.numel() for w in fm.tree.leaves(fitted.weights))
    whole = module.whole(fitted.weights)  # on every process: all of them must ask
    if dist.get_rank() == 0:
        mesh_text = " ".join(f"{name}={size}" for name, size in sizes.items())
        print(f"{mesh_text}: loss {fitted.losses[0]:.4f} -> {fitted.losses[-1]:.4f}, ", end="")
        print(f"{held:,} of {model.num_parameters:,} parameters on rank 0")
        if args.save:
            fm.save(model, whole, args.save)
    dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("dp", "fsdp", "tp"):
        parser.add_argument(f"--{name}", type=int, default=1, help="ranks along this dim")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--batch", type=int, default=4, help="rows, of all ranks together")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", help="a folder for the trained model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
