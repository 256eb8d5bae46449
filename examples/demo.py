"""The main job, small, on this machine: data, training that is stopped and resumed, evaluation, export, weights in another program.

    make demo          or: python -m examples.demo

Everything runs as it does on a cluster: the same commands, two ranks (one for each GPU where there are two or more), ZeRO-1, bf16,
DALI, sharded checkpoints. It writes datasets/demo and runs/demo anew.
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
AGAIN = 85  # the exit code of a job that was told to stop and has saved

# Loads the exported weights as another project would: by file, into a model of its own process.
LOAD = """
import sys, timm, torch
import pretrain.model.van
from pretrain.model.formats import from_format
torch.manual_seed(0)
images = torch.randn(8, 3, 64, 64)
from_timm = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
from_pth = timm.create_model("van_b0", num_classes=10).eval()
from_pth.load_state_dict(from_format(torch.load(sys.argv[2], weights_only=True)))
from pretrain.weights.run_model import build_trained
from pathlib import Path
trained = build_trained(Path(sys.argv[3]), average=True)[0]
with torch.no_grad():
    logits = [model(images) for model in (trained, from_timm, from_pth)]
assert all(torch.equal(logits[0], other) for other in logits[1:]), "logits differ"
print("equal logits from the run, the timm folder and the authors' format; the first image's:")
print(" ".join(f"{value:.3f}" for value in logits[0][0].tolist()))
"""


def main() -> None:
    began = time.monotonic()
    for folder in (DATA, RUN):
        shutil.rmtree(folder, ignore_errors=True)

    say("1/6  drawing 2,100 images of ten classes and packing them into shards")
    python("-m", "data", "synthesize", str(DATA))

    say("2/6  pretraining VAN-B0 at 64 px; half-way it gets the signal that Slurm sends before a time limit")
    job = start_job("configs/demo.yaml")
    wait_for_step(job, half_of_training())
    job.send_signal(signal.SIGUSR1)
    expect(job.wait(), AGAIN)

    say("3/6  the same command again: it resumes from the sharded checkpoint")
    expect(start_job("configs/demo.yaml").wait(), 0)

    say("4/6  evaluating the moving average of the weights")
    python("-m", "pretrain", "evaluate", str(RUN), "--weights", "ema")
    accuracy = last("evaluation")["ema"]["top1"]
    if accuracy <= 0.9:
        sys.exit(f"error: top-1 is {accuracy:.1%}; over 90 % was expected")

    say("5/6  exporting for timm and for the authors' code")
    python("-m", "pretrain", "export", str(RUN), "--format", "timm", "--weights", "ema", "--out", str(RUN / "timm"))
    python("-m", "pretrain", "export", str(RUN), "--format", "official", "--weights", "ema", "--out", str(RUN / "van_b0.pth"))

    say("6/6  loading both in a fresh process")
    python("-c", LOAD, str(RUN / "timm"), str(RUN / "van_b0.pth"), str(RUN))

    say(f"done in {time.monotonic() - began:.0f} s: top-1 {accuracy:.1%} on {last('evaluation')['ema']['images']} images (chance is 10 %)")
    print(
        f"""
  {DATA}/train, {DATA}/val   shards (.tar), DALI indexes (.idx), the packed index
  {RUN}/checkpoints          sharded checkpoints, resumable on any number of ranks
  {RUN}/metrics.jsonl        what was measured while training
  {RUN}/timm                 weights for timm.create_model("local-dir:{RUN}/timm", pretrained=True)
  {RUN}/van_b0.pth           weights for the authors' code

Next, the real job on a Slurm cluster:
  sbatch launch/van_b3_in22k.sh data.train=/path/to/in22k/train data.val=/path/to/in22k/val
"""
    )


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def python(*arguments: str) -> None:
    expect(subprocess.run([sys.executable, *arguments]).returncode, 0)


def expect(code: int, expected: int) -> None:
    if code != expected:
        sys.exit(f"error: the step above ended with exit code {code} instead of {expected}")


def start_job(*arguments: str) -> subprocess.Popen:
    import torch

    # One GPU can't serve two ranks (NCCL refuses); without GPUs two ranks share the cores.
    ranks = os.environ.get("RANKS") or str(min(2, torch.cuda.device_count()) or 2)
    return subprocess.Popen(["bash", "launch/job.sh", *arguments], env=os.environ | {"RANKS": ranks})


def records(kind: str) -> list[dict]:
    path = RUN / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def last(kind: str) -> dict:
    return records(kind)[-1]


def half_of_training() -> int:
    from data.dataset.index import open_index
    from pretrain.config import load

    config = load("configs/demo.yaml")
    return round(config.epochs * (len(open_index(DATA / "train")) // config.global_batch)) // 2


def wait_for_step(job: subprocess.Popen, step: int) -> None:
    while not any(record["step"] >= step for record in records("train")):
        if job.poll() is not None:
            sys.exit(f"error: training ended early, with exit code {job.returncode}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
