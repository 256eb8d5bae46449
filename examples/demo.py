"""Runs a small version of the main job on this machine: data, training with a stop and a resume, evaluation, export, loading the weights.

    make demo          or: python -m examples.demo

It uses the same commands and stack as on a cluster: two ranks (one if there is a single GPU), ZeRO-1, bf16, DALI, sharded
checkpoints. It replaces datasets/demo and runs/demo.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

DATA, RUN = Path("datasets/demo"), Path("runs/demo")
REQUEUE = 85  # the exit code of a job that has saved a checkpoint after a stop signal

# Run in a separate process, loads the exported weights from their files, as another project would. The weights are the same bits, but
# a run's model holds some of them channels-last, for which convolutions can sum in another order.
LOAD = """
import sys, timm, torch
from pathlib import Path
import pretrain.model.van
from pretrain.model.formats import from_format
from pretrain.weights.run_model import build_trained
torch.manual_seed(0)
images = torch.randn(8, 3, 64, 64)
from_timm = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
trained = build_trained(Path(sys.argv[3]), average=True)[0]
from_pth = timm.create_model("van_b0", num_classes=trained.num_classes).eval()
from_pth.load_state_dict(from_format(torch.load(sys.argv[2], weights_only=True)))
with torch.no_grad():
    logits = [model(images) for model in (trained, from_timm, from_pth)]
for other in logits[1:]:
    torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-5)
print("equal logits (to 1e-5) from the run, the timm folder and the authors' format; logits of the first image:")
print(" ".join(f"{value:.3f}" for value in logits[0][0].tolist()))
"""


def main() -> None:
    began = time.monotonic()
    for folder in (DATA, RUN):
        shutil.rmtree(folder, ignore_errors=True)

    announce("1/6  drawing 2,100 images of ten classes and packing them into shards")
    run_python("-m", "data", "synthesize", str(DATA))

    announce("2/6  pretraining VAN-B0 at 64 px; half-way through, it receives the signal that Slurm sends before a time limit")
    job = start_job("configs/demo.yaml")
    wait_for_step(job, count_steps() // 2)
    job.send_signal(signal.SIGUSR1)
    check_exit(job.wait(), REQUEUE)

    announce("3/6  running the same command again: it resumes from the sharded checkpoint")
    check_exit(start_job("configs/demo.yaml").wait(), 0)

    announce("4/6  evaluating the moving average of the weights")
    run_python("-m", "pretrain", "evaluate", str(RUN), "--weights", "ema")
    evaluation = read_records("evaluation")[-1]["ema"]
    accuracy = evaluation["top1"]
    if accuracy <= 0.9:
        sys.exit(f"error: top-1 is {accuracy:.1%}; expected more than 90 %")

    announce("5/6  exporting for timm and for the authors' code")
    run_python("-m", "pretrain", "export", str(RUN), "--format", "timm", "--weights", "ema", "--out", str(RUN / "timm"))
    run_python("-m", "pretrain", "export", str(RUN), "--format", "official", "--weights", "ema", "--out", str(RUN / "van_b0.pth"))

    announce("6/6  loading both in a new process")
    run_python("-c", LOAD, str(RUN / "timm"), str(RUN / "van_b0.pth"), str(RUN))

    announce(f"done in {time.monotonic() - began:.0f} s: top-1 {accuracy:.1%} on {evaluation['images']} images (chance is 10 %)")
    print(
        f"""
  {DATA}/train, {DATA}/val   shards (.tar), DALI indexes (.idx), the packed index
  {RUN}/checkpoints          sharded checkpoints, resumable on any number of ranks
  {RUN}/metrics.jsonl        metrics of the training
  {RUN}/timm                 weights for timm.create_model("local-dir:{RUN}/timm", pretrained=True)
  {RUN}/van_b0.pth           weights for the authors' code

Next, the real job on a Slurm cluster:
  sbatch launch/van_b3_in22k.sh data.train=/path/to/in22k/train data.val=/path/to/in22k/val
"""
    )


def announce(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run_python(*arguments: str) -> None:
    check_exit(subprocess.run([sys.executable, *arguments]).returncode, 0)


def check_exit(code: int, expected: int) -> None:
    if code != expected:
        sys.exit(f"error: the step above ended with exit code {code} instead of {expected}")


def start_job(*arguments: str) -> subprocess.Popen:
    import torch

    # NCCL rejects two ranks on one GPU; without GPUs, two ranks share the cores.
    ranks = os.environ.get("RANKS") or str(min(2, torch.cuda.device_count()) or 2)
    return subprocess.Popen(["bash", "launch/job.sh", *arguments], env=os.environ | {"RANKS": ranks})


def read_records(kind: str) -> list[dict]:
    path = RUN / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def count_steps() -> int:
    """Returns the number of training steps of configs/demo.yaml."""
    from data.dataset.index import open_index
    from pretrain.config import load

    config = load("configs/demo.yaml")
    return round(config.epochs * (len(open_index(DATA / "train")) // config.global_batch))


def wait_for_step(job: subprocess.Popen, step: int) -> None:
    while not any(record["step"] >= step for record in read_records("train")):
        if job.poll() is not None:
            sys.exit(f"error: training ended early, with exit code {job.returncode}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
