#!/usr/bin/env python3
"""All that a real GPU has to say, in one call and one report: `make gpu-check`, or with DEVICE=cuda-emulated on any
machine, where every part runs that needs no GPU.

  gpu_check.py [--device cuda|cuda-emulated] [--model DIR] [--report FILE.md] [--quick]

  1 machine     GPU, driver, toolkit, this version
  2 tests       the rooms' and models' tests with the device among the backends
  3 bits        operations that add in a fixed order against the emulator, bit by bit; the others' distance
  4 races       the rooms under compute-sanitizer: memcheck, racecheck, synccheck
  5 operations  each operation's time beside its roofline time
  6 training    the demonstration, then --model (SmolLM2-135M-Instruct: tools/real_model.sh brings it): losses beside
                the CPU's; the same run twice, bit by bit

Programs are built already (make gpu-check does). Writes FILE.md and the same as FILE.json; a part that fails does not
stop the others. --quick: fewer tests and steps. The last line is `N passed, N failed`; exit status 1 where one
failed."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

from gpu.roofline import operations_table

TESTS = "build/release/orpo_tests"
ROOMS = "embedding:*,linear:*,norm:*,rope:*,attention*:*,activation:*,head:*,preference:*,adamw:*"
MODELS = "model:*,reference:*,gpt2:*,decode:*,master:*"


class Failed(Exception):
    """What a part found wrong; its text is the report's."""


class Skipped(Exception):
    """Why a part could not run here."""


def run(command, timeout=3600, **environment):
    """(exit status, output) of a command; its last lines go to the report where it fails."""
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
                         env={**os.environ, **environment})
    return ran.returncode, ran.stdout


def tail(text, lines=15):
    return "\n".join(text.rstrip().splitlines()[-lines:])


def must(command, **environment):
    status, output = run(command, **environment)
    if status != 0:
        raise Failed(f"`{' '.join(command)}` ended with status {status}\n\n```\n{tail(output)}\n```")
    return output


class Check:
    """The parts, in order; each returns its text for the report."""

    def __init__(self, options):
        self.device, self.model, self.quick = options.device, options.model, options.quick
        self.emulated = self.device == "cuda-emulated"
        self.environment = {"ORPO_TEST_DEVICE": self.device}
        self.gpu = ""
        self.figures = {}

    def tests_of(self, cases):
        return [TESTS, f"--test-case={cases}"]

    def machine(self):
        lines = ["commit " + must(["git", "describe", "--always", "--dirty"]).strip()] if shutil.which("git") else []
        if shutil.which("nvcc"):
            lines.append(must(["nvcc", "--version"]).strip().splitlines()[-1])
        if self.emulated:
            return "\n".join(lines + ["no GPU: kernels run on the emulator"])
        if not shutil.which("nvidia-smi"):
            raise Failed("no nvidia-smi here, so no GPU; `make gpu-check DEVICE=cuda-emulated` needs none")
        query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
        found = must(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]).strip().splitlines()
        self.gpu = found[0].split(",")[0].strip()
        self.figures["gpus"] = found
        return "\n".join(lines + found)

    def tests(self):
        cases = "norm:*,rope:*,head:*" if self.quick else ROOMS + "," + MODELS
        return "`" + cases + "`: " + tail(must(self.tests_of(cases), **self.environment), 1)

    def bits(self):
        output = must(self.tests_of("gpu:*"), **self.environment)
        return "```\n" + tail(output, 40) + "\n```"

    def races(self):
        tools = ["memcheck", "racecheck", "synccheck"]
        if self.emulated:  # the same command without its tool, so that it has run once before there is a GPU
            must(self.tests_of("norm:*" if self.quick else ROOMS), **self.environment)
            raise Skipped("compute-sanitizer needs a GPU; the rooms ran without it")
        if not shutil.which("compute-sanitizer"):
            raise Failed("no compute-sanitizer here: it comes with the CUDA toolkit")
        said = []
        for tool in tools:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
            output = must(command + self.tests_of(ROOMS), **self.environment)
            said.append(f"{tool}: " + next((l.strip("= ") for l in output.splitlines() if "ERROR SUMMARY" in l
                                            or "RACECHECK SUMMARY" in l), "no summary"))
        return "\n".join(said)

    def operations(self):
        said = []
        for shape in ["tiny"] if self.emulated else ["mistral-7b", "phi-2"]:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                must(["build/release/orpo_bench", "--only", "operations", "--shape", shape, "--device", self.device,
                      "--json", file.name] + (["--quick"] if self.emulated else []))
                measured = json.load(open(file.name))
            self.figures["operations, " + shape] = measured
            for list_of_dtype in measured["operations"]:
                said.append(operations_table(shape, list_of_dtype, self.gpu))
        return "\n\n".join(said)

    def losses(self, device, model, more, folder):
        """Losses of a run, step by step, as numbers and as bits."""
        must(["./orpo_train", "--model", model, "--device", device, "--output", folder, "--overwrite", "--no-shuffle",
              *more])
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            return [json.loads(line)["loss"] for line in file if '"loss"' in line]

    def compare_training(self, name, model, more, bounds):
        said = []
        with tempfile.TemporaryDirectory() as folder:
            for dtype, bound in bounds.items():
                arguments = [*more, "--dtype", dtype]
                cpu = self.losses("cpu", model, arguments, folder + "/cpu")
                ours = self.losses(self.device, model, arguments, folder + "/device")
                again = self.losses(self.device, model, arguments, folder + "/again")
                distance = max(abs(a - b) / abs(a) for a, b in zip(cpu, ours))
                self.figures[f"training, {name}, {dtype}"] = {"cpu": cpu, self.device: ours}
                said.append(f"{name}, {dtype}: {len(ours)} steps, last loss {ours[-1]:.6f}, the CPU's {cpu[-1]:.6f}, "
                            f"largest distance {distance:.1e} (at most {bound:.0e})")
                if len(ours) != len(cpu) or not ours or not distance <= bound:
                    raise Failed("\n".join(said) + f"\n\nCPU {cpu}\n\n{self.device} {ours}")
                if again != ours:
                    raise Failed("\n".join(said) + f"\n\nnot the same twice: {ours}, then {again}")
        return "\n".join(said)

    def demonstration(self):
        steps = "2" if self.quick else "3" if self.emulated else "20"
        rows = ["--init", "random", "--data", "data/demonstration/train.jsonl", "--learning-rate", "1e-3",
                "--batch-pairs", "4" if self.emulated else "16", "--max-steps", steps]
        return self.compare_training("demonstration", "data/demonstration/model", rows, {"fp32": 1e-4, "bf16": 2e-2})

    def real_model(self):
        if self.emulated:
            raise Skipped("takes hours on the emulator")
        if not self.model or not os.path.exists(os.path.join(self.model, "config.json")):
            raise Skipped("no model: MODEL=DIR, or tools/real_model.sh build/real, which needs the network once")
        rows = ["--data", "data/demonstration/train.jsonl", "--batch-pairs", "8", "--max-steps", "5"]
        return self.compare_training(os.path.basename(self.model.rstrip("/")), self.model, rows,
                                     {"fp32": 1e-4, "bf16": 2e-2})

    def parts(self):
        return {"machine": self.machine, "tests": self.tests, "bits": self.bits, "races": self.races,
                "operations": self.operations, "training: demonstration": self.demonstration,
                "training: a real model": self.real_model}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cuda-emulated"])
    parser.add_argument("--model", default="build/real/SmolLM2-135M-Instruct")
    parser.add_argument("--report", default="build/gpu_check.md")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    check = Check(options)
    results = []
    for name, part in check.parts().items():
        start = time.time()
        try:
            status, text = "passed", part()
        except Skipped as why:
            status, text = "skipped", str(why)
        except Failed as why:
            status, text = "failed", str(why)
        except (OSError, subprocess.TimeoutExpired, KeyError, ValueError) as why:
            status, text = "failed", f"{type(why).__name__}: {why}"
        results.append({"part": name, "status": status, "seconds": round(time.time() - start, 1), "text": text})
        print(f"{status:8} {name} ({results[-1]['seconds']} s)" + ("" if status == "passed" else f": {tail(text, 12)}"),
              flush=True)
    os.makedirs(os.path.dirname(options.report) or ".", exist_ok=True)
    with open(options.report, "w") as file:
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        file.write(f"# gpu-check on {check.gpu or options.device}, {when} UTC\n\n")
        file.write("| part | status | seconds |\n|---|---|---|\n")
        file.writelines(f"| {r['part']} | {r['status']} | {r['seconds']} |\n" for r in results)
        file.writelines(f"\n## {r['part']}: {r['status']}\n{r['text']}\n" for r in results)
    with open(os.path.splitext(options.report)[0] + ".json", "w") as file:
        json.dump({"device": options.device, "parts": results, "figures": check.figures}, file, indent=1)
    count = lambda status: sum(r["status"] == status for r in results)
    skipped = f", {count('skipped')} skipped" if count("skipped") else ""
    print(f"the report: {options.report}\n{count('passed')} passed, {count('failed')} failed{skipped}")
    return int(count("failed") > 0)


if __name__ == "__main__":
    sys.exit(main())
