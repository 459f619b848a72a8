"""Seconds, weights a second and memory of `birkhoff compress` on a full-size SAM.

    python benches/compress_time.py [--model b|l|h] [--bits 4] [--threads 2] [--runs 3] [--json]

The checkpoint is written once and read once, so that it is in the page cache; the command then runs
as a user would run it, in a process of its own. Anonymous memory (`RssAnon`: all but the mapped
input) is sampled every 10 ms. Beside it, the speed of the codec alone: one matrix in memory, one
thread, complete (scales, search, packing, refit), for each instruction set.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from machine import cpu_name
from weights import sam_state_dict

MIB = 2**20


def anonymous_memory(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    fields = (line.split() for line in status.splitlines() if line.startswith("RssAnon"))
    return next((int(field[1]) * 1024 for field in fields), 0)


def run_command(command: list[str], threads: int) -> tuple[float, int, dict[str, object]]:
    """Seconds, peak anonymous bytes, and the JSON that the command printed."""
    environment = os.environ | {"BIRKHOFF_NUM_THREADS": str(threads)}
    peak = 0
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def sample() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.01)

    sampler = threading.Thread(target=sample)
    sampler.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    sampler.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return seconds, peak, json.loads(output)


def codec_speed(bits: int, isa: str) -> float:
    """Weights a second of one thread, median of five, in a process that is forced to ``isa``."""
    script = (
        "import time, statistics, numpy, birkhoff\n"
        "from weights import gaussian_matrix\n"
        "weights = gaussian_matrix(512, 1280)\n"
        f"birkhoff.encode(weights, bits={bits})\n"
        "times = []\n"
        "for _ in range(5):\n"
        "    start = time.perf_counter()\n"
        f"    birkhoff.encode(weights, bits={bits})\n"
        "    times.append(time.perf_counter() - start)\n"
        "print(weights.size / statistics.median(times))\n"
    )
    environment = os.environ | {"BIRKHOFF_ISA": isa, "BIRKHOFF_NUM_THREADS": "1"}
    return float(
        subprocess.check_output(
            [sys.executable, "-c", script], env=environment, cwd=Path(__file__).parent, text=True
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["b", "l", "h"], default="h")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    from safetensors.torch import save_file

    from birkhoff import _core

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "sam.safetensors", Path(folder) / "sam.birkhoff.safetensors"
        state = sam_state_dict(arguments.model)
        weights = sum(tensor.numel() for tensor in state.values())
        save_file(state, source)
        del state
        command = [sys.executable, "-m", "birkhoff", "compress", str(source), "-o", str(target)]
        command += ["--bits", str(arguments.bits), "--force", "--json"]
        runs = [run_command(command, arguments.threads) for _ in range(arguments.runs)]
        ratio = source.stat().st_size / target.stat().st_size
        # What the disk alone takes: the same bytes, written and synced.
        content = target.read_bytes()
        start = time.perf_counter()
        with (Path(folder) / "copy").open("wb") as copy:
            copy.write(content)
            copy.flush()
            os.fsync(copy.fileno())
        disk = time.perf_counter() - start

    seconds = statistics.median(run[0] for run in runs)
    report = {
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "model": f"sam-{arguments.model}",
        "weights": weights,
        "bits": arguments.bits,
        "ratio": round(ratio, 3),
        "seconds": round(seconds, 2),
        "seconds_each": [round(run[0], 2) for run in runs],
        "seconds_to_write_and_sync_alone": round(disk, 2),
        "mweights_per_second": round(weights / seconds / 1e6, 1),
        "peak_anonymous_mib": round(max(run[1] for run in runs) / MIB, 1),
        "codec_mweights_per_second_one_thread": {
            isa: round(codec_speed(arguments.bits, isa) / 1e6, 1) for isa in _core.available_isas()
        },
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name:38} {value}")


if __name__ == "__main__":
    main()
