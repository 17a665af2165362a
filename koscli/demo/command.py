"""The `kos demo` command: starts the stage, takes the tour, prints the table, stays up.

Owns: the order of things and what is printed. Does not own: the processes (stage) or the steps (tour).

Invariant: the exit status is 0 only if every step of the tour held.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Final

from koscli.demo.cluster_tour import ClusterTour
from koscli.demo.stage import Stage, StageFailed
from koscli.demo.tour import Step, Tour

#: Three processes each.
NODES_MAX: Final = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="end after the tour; the exit status says whether it held")
    parser.add_argument(
        "--large-mib", type=int, default=256, metavar="N", help="size of the large object (default 256)"
    )
    parser.add_argument("--small-count", type=int, default=300, metavar="N", help="number of small files (300)")
    parser.add_argument(
        "--port", type=int, default=0, metavar="PORT", help="S3 port of the (first) node (default: a free one)"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="as many nodes, which form a cluster (1)")


def run(args: argparse.Namespace) -> int:
    if args.large_mib < 1 or args.small_count < 1:
        print("kos demo: --large-mib and --small-count must be at least 1", file=sys.stderr)
        return 2
    if not 1 <= args.nodes <= NODES_MAX:
        print(f"kos demo: --nodes must be from 1 to {NODES_MAX}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="kos-demo-") as directory:
        try:
            with Stage(Path(directory), s3_port=args.port, nodes=args.nodes) as stage:
                return _show(stage, args)
        except StageFailed as failure:
            print(f"kos demo: {failure}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


def _show(stage: Stage, args: argparse.Namespace) -> int:
    print("This is a demonstration: the origin is moto, in memory, and everything here is gone when it ends.\n")
    print(f"  origin   {stage.origin_url}   (moto)")
    if len(stage.nodes) == 1:
        print(f"  kos      {stage.s3_url}   (S3)")
        print(f"           {stage.s3_tls_url}   (S3 over https; its certificate is {stage.ca_file})")
        print(f"  admin    {stage.admin_url}   (/readyz /metrics)\n", flush=True)
    else:
        for node in stage.nodes:
            print(f"  {node.name:8} {node.s3_url}   (S3; admin {node.admin_url})")
        print(flush=True)
    kind = Tour if len(stage.nodes) == 1 else ClusterTour
    tour = kind(stage, small_count=args.small_count, large_bytes=args.large_mib << 20)
    steps: list[Step] = []
    for step in tour.steps():
        steps.append(step)
        mark = "ok " if step.held else "NO "
        print(f"  {mark} {step.name:<38} {step.seconds:8.2f} s  {step.detail}", flush=True)
    held = all(step.held for step in steps)
    if isinstance(tour, ClusterTour):
        held = _ask(tour, "cluster", "status") and held
        held = _ask(tour, "cluster", "locate", f"s3://{stage.bucket}/datasets/large.bin") and held
    print(f"\n{sum(step.held for step in steps)} of {len(steps)} steps held.")
    if args.check:
        return 0 if held else 1
    print(_how_to_connect(stage), flush=True)
    _wait_for_interrupt()
    return 0 if held else 1


def _ask(tour: ClusterTour, *words: str) -> bool:
    """Show what a command says; whether it could."""
    code, said = tour.command(*words)
    print(f"\n$ kos {' '.join(words)}\n{said.rstrip()}", flush=True)
    return code == 0


def _how_to_connect(stage: Stage) -> str:
    return f"""
Try it yourself while this runs (stop with ^C):

  export AWS_ACCESS_KEY_ID={stage.access_key} AWS_SECRET_ACCESS_KEY={stage.secret_key} AWS_DEFAULT_REGION=us-east-1
  aws --endpoint-url {stage.s3_url} s3 ls s3://{stage.bucket}/
  aws --endpoint-url {stage.s3_url} s3 cp s3://{stage.bucket}/datasets/large.bin - | sha256sum
  aws --endpoint-url {stage.s3_tls_url} --ca-bundle {stage.ca_file} s3 ls s3://{stage.bucket}/

  python -c 'import boto3; s3 = boto3.client("s3", endpoint_url="{stage.s3_url}"); \\
             print(s3.get_object(Bucket="{stage.bucket}", Key="datasets/large.bin")["ResponseMetadata"]["HTTPHeaders"])'

  kos explain --admin {stage.admin_url} s3://{stage.bucket}/datasets/large.bin""" + (
        ""
        if len(stage.nodes) == 1
        else f"""
  kos cluster status --admin {stage.admin_url}
  kos cluster locate --admin {stage.admin_url} s3://{stage.bucket}/datasets/large.bin"""
    )


def _wait_for_interrupt() -> None:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
