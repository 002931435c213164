"""Make or refresh a virtual environment from the locked requirements.

`install.py VENV` makes what lakebus runs in, `--dev` adds what tests need; `--peers` makes the
environment of the programs that benchmarks compare with, and nothing else.

Runs on whatever Python the machine has, so it uses the standard library only, and stays readable
for versions that are too old, to tell them so. Nothing is installed but what a hash names.
"""

import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)


def main():
    if sys.version_info < (3, 11):
        version = sys.version.split()[0]
        fail(
            f"lakebus needs Python 3.11 or newer, and this is {version} ({sys.executable}).",
            "Install a newer Python, or name one: make PYTHON=/path/to/python3.12 ...",
        )
    venv = os.path.abspath(sys.argv[1])
    python = os.path.join(venv, "bin", "python")
    if not working(python):
        make_environment(venv)
    pip = pip_for(python)
    if "--peers" in sys.argv:
        run([*pip, "install", "--require-hashes", "-r", os.path.join(HERE, "peers.txt")])
        return
    locked = ["build.txt", "runtime.txt"] + (["dev.txt"] if "--dev" in sys.argv else [])
    files = [part for name in locked for part in ("-r", os.path.join(HERE, name))]
    run([*pip, "install", "--require-hashes", *files])
    plain = [*pip, "install", "--no-deps", "--no-build-isolation"]
    run([*plain, "--require-hashes", "-r", os.path.join(HERE, "demo.txt")])
    run([*plain, "--editable", ROOT])


def working(python):
    """True if this interpreter is there and is the version that made the environment."""
    try:
        said = subprocess.run(
            [python, "-c", "import sys; print(sys.version_info[:2])"], stdout=subprocess.PIPE
        )
    except OSError:
        return False
    return said.stdout.decode().strip() == str(sys.version_info[:2])


def make_environment(venv):
    # Without pip: Debian ships Python without `ensurepip`, and any pip of the machine can install
    # into another environment.
    print(f"making {venv} with Python {sys.version.split()[0]}", flush=True)
    try:
        import venv as maker
    except ImportError:
        fail(
            "This Python has no module `venv`.",
            "Install it (on Debian and Ubuntu: apt install python3-venv) and try again.",
        )
    maker.EnvBuilder(with_pip=False, clear=True, symlinks=True).create(venv)


def pip_for(python):
    """The command that runs a pip for the environment: its own, the machine's, or a new one."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    options = ["--quiet", "--disable-pip-version-check", "--no-input"]
    own = [python, "-m", "pip"]
    if subprocess.run([*own, "--version"], **quiet).returncode == 0:
        return own + options
    machine = [sys.executable, "-m", "pip", "--python", python]
    if subprocess.run([*machine, "--version"], **quiet).returncode == 0:
        return machine + options
    if subprocess.run([python, "-m", "ensurepip"], **quiet).returncode == 0:
        return own + options
    return fail(
        "This Python has neither pip (22.3 or newer) nor `ensurepip`.",
        "Install pip (on Debian and Ubuntu: apt install python3-pip python3-venv) and try again.",
    )


def run(command):
    ended = subprocess.run(command)
    if ended.returncode != 0:
        fail("pip could not install the locked packages; it says why above.", "")


def fail(what, how):
    sys.exit("\n".join(["", what, how]).rstrip())


main()
