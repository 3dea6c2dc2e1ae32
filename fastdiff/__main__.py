"""python -m fastdiff COMMAND: the commands, and the modules they live in."""

import sys
from importlib import import_module

# command -> (module:main, what it does, the extra that holds what it imports)
COMMANDS = {
    "info": ("fastdiff.info:main", "versions, processor, GPU, native libraries and what to do about missing ones", None),
    "bench": ("fastdiff.bench.suite:main", "time the ops against other libraries, side by side", "bench"),
    "verify": ("fastdiff.testing.verify:main", "compare every op with its reference on random examples", "test"),
    "doctor": ("fastdiff.doctor:main", "what accelerate would do for a model, measured, and what nothing can", None),
    "demo": ("fastdiff.demo:main", "public models on a real photograph, plain and accelerated", "demo"),
    "train": ("fastdiff.train:main", "a small model on digits or on a folder of images, and its samples", "train"),
}
HELP = "usage: python -m fastdiff COMMAND [OPTION ...]\n\n" + "".join(f"  {name:8} {text}\n" for name, (_, text, _) in COMMANDS.items()) + (
    "\npython -m fastdiff COMMAND --help lists the options of a command")


def main(argv):
    """Runs a command; returns its exit code, 2 for an unknown one."""
    if argv[:1] in (["-h"], ["--help"], ["help"]):
        print(HELP)
        return 0
    if not argv or argv[0] not in COMMANDS:
        print(f"fastdiff: unknown command {argv[0]!r}\n\n{HELP}" if argv else HELP, file=sys.stderr)
        return 2
    target, _, extra = COMMANDS[argv[0]]
    module, function = target.split(":")
    try:
        run = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("fastdiff"):
            raise
        print(f"fastdiff {argv[0]} needs {error.name}: pip install 'fastdiff-kernels[{extra}]'", file=sys.stderr)
        return 2
    return run(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
