"""Linearizes a model of transformers on many processes, its frozen weights sharded over them (FSDP2).

    torchrun --nproc-per-node 2 examples/fsdp_linearize.py --model MODEL --data FILE --out DIR --run-dir DIR

Processes use NCCL and a GPU each where there are GPUs, gloo and the CPU otherwise. Started again with `--resume`, the run goes
on from its last checkpoint, with any number of processes that divides the recipe's batch. docs/many_gpus.md says more.
"""

import argparse
import json
import os

import still.torch
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a directory or a hub id")
    parser.add_argument("--data", required=True, nargs="+", help=".txt, .jsonl, .jsonl.zst or .bin files")
    parser.add_argument("--out", required=True, help="directory of the student")
    parser.add_argument("--run-dir", required=True, help="directory of metrics and checkpoints")
    parser.add_argument("--recipe", help="a name that `still recipes list` prints, or a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a value of the recipe, as JSON")
    parser.add_argument("--budgets", help="a file that `still calibrate --out` wrote")
    parser.add_argument("--dtype", default="auto", help="of the frozen weights: auto, float32 or bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    return parser.parse_args()


def value(text):
    """JSON, or a string without quotes."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main():
    args = arguments()
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")
    mesh = dist.init_device_mesh("cuda" if gpus else "cpu", (dist.get_world_size(),))

    # On the host first: what is sharded goes to the GPU layer by layer.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    changed = {key: value(text) for key, _, text in (setting.partition("=") for setting in args.set)}
    student = still.torch.linearize(model, args.recipe, set=changed, budgets=args.budgets, data=args.data, train=False)
    student.shard(mesh)
    student.train(args.data, run_dir=args.run_dir, resume=args.resume, progress=show)
    student.save(args.out, overwrite=args.resume)
    dist.destroy_process_group()


def show(event):
    """On the first process alone."""
    if event["event"] == "step":
        print("{stage} {step}: loss {loss:.5g}, gradient {grad_norm:.3g}, rate {lr:.3g}".format(**event), flush=True)
    else:
        print(" ".join(str(x) for x in event.values()), flush=True)


if __name__ == "__main__":
    main()
