"""The allocator's settings reach a real process and keep the user's own; bf16 is what torch itself finds."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from mage_core import machine

needs_glibc = pytest.mark.skipif(machine.glibc_version() is None, reason="glibc's settings need glibc")


def run(*arguments, tunables=None, folder=None, **environment):
    """Run Python on the arguments, with nothing of ours in its environment but what is given."""
    base = {name: value for name, value in os.environ.items()
            if name not in (machine.TUNABLES, machine.RELAUNCHED)}
    if tunables is not None:
        base[machine.TUNABLES] = tunables
    return subprocess.run([sys.executable, *arguments], env={**base, **environment}, cwd=folder, capture_output=True,
                          text=True, timeout=300)


@needs_glibc
def test_settings_are_spelt_as_glibc_reads_them(monkeypatch):
    monkeypatch.delenv(machine.TUNABLES, raising=False)
    settings = machine.fast_allocator_environment()
    assert list(settings) == ["GLIBC_TUNABLES"]
    assert settings["GLIBC_TUNABLES"] == (
        "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:"
        "glibc.malloc.top_pad=268435456")


@needs_glibc
def test_settings_of_the_user_stay_and_win(monkeypatch):
    monkeypatch.setenv(machine.TUNABLES, "glibc.malloc.mmap_max=7:glibc.pthread.rseq=0")
    value = machine.fast_allocator_environment()[machine.TUNABLES]
    pairs = dict(setting.split("=") for setting in value.split(":"))
    assert len(pairs) == len(value.split(":")) == 5
    assert pairs["glibc.malloc.mmap_max"] == "7" and pairs["glibc.pthread.rseq"] == "0"
    assert pairs["glibc.malloc.hugetlb"] == "1"
    # asked again inside the process that got them, nothing changes: this is what ends the relaunching
    monkeypatch.setenv(machine.TUNABLES, value)
    assert machine.fast_allocator_environment()[machine.TUNABLES] == value


def test_nothing_is_set_without_glibc(monkeypatch):
    monkeypatch.setattr(machine, "glibc_version", lambda: None)
    assert machine.fast_allocator_environment() == {}
    assert "allocator" not in machine.describe()


@needs_glibc
def test_large_blocks_stay_in_the_process():
    """Asked by what the kernel counts, without huge pages: freed memory comes back without new page faults."""
    code = textwrap.dedent("""
        import ctypes, resource
        libc = ctypes.CDLL(None)
        assert libc.prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE
        libc.malloc.restype = ctypes.c_void_p
        libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
        def faults(rounds):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(rounds):
                block = libc.malloc(64 << 20)
                ctypes.memset(block, 1, 64 << 20)
                libc.free(block)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        faults(1)
        print(faults(4) * resource.getpagesize() / (4 * (64 << 20)))
    """)
    fast = run("-c", code, tunables=machine.fast_allocator_environment()[machine.TUNABLES])
    plain = run("-c", code)
    assert fast.returncode == plain.returncode == 0, fast.stderr + plain.stderr
    assert float(fast.stdout) < 0.05 and float(plain.stdout) > 0.9  # the share of the memory that was faulted in


@needs_glibc
def test_command_line_is_relaunched_once_with_its_arguments(tmp_path):
    """A module of the package that tells what it was started with, the way `mage_core.training` is."""
    (tmp_path / "mage_core").mkdir()
    (tmp_path / "mage_core" / "__init__.py").write_text(
        f"__path__.append({str(machine.Path(machine.__file__).parent)!r})\n")
    (tmp_path / "mage_core" / "told.py").write_text(textwrap.dedent("""
        import json, os, sys
        from mage_core.machine import relaunch_with_fast_allocator
        print("started", os.getpid())
        relaunch_with_fast_allocator()
        print(json.dumps([sys.argv[1:], sys.flags.dev_mode, os.environ["GLIBC_TUNABLES"], os.getpid()]))
    """))
    command = ["-X", "dev", "-m", "mage_core.told", "--dataset", "with space", ""]
    done = run(*command, tunables="glibc.pthread.rseq=0", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, told = done.stdout.splitlines()  # twice, not for ever, and the first line was not lost
    arguments, dev_mode, tunables, pid = json.loads(told)
    assert first == second == f"started {pid}"
    assert arguments == ["--dataset", "with space", ""] and dev_mode
    assert tunables.endswith(":glibc.pthread.rseq=0") and "hugetlb=1" in tunables
    # a setting that does not stick must not start it again and again
    again = run(*command, folder=tmp_path, tunables="glibc.pthread.rseq=0", **{machine.RELAUNCHED: "1"})
    assert again.stdout.count("started") == 1


@needs_glibc
def test_the_module_itself_describes_its_fast_self():
    done = run("-m", "mage_core.machine", folder=machine.Path(machine.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("machine: ") and "fast allocator" in done.stdout


@pytest.mark.parametrize("module", ["machine", "bench", "training"])
def test_a_command_is_not_imported_before_it_runs(module):
    done = run("-W", "error", "-m", f"mage_core.{module}", "--help",
               folder=machine.Path(machine.__file__).parent.parent)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("first", ["", "import mage_core.generate", "import mage_core.training",
                                   "from mage_core.generate import generate_videos", "from mage_core import generate"])
def test_the_package_has_its_functions_whatever_was_imported_first(first):
    """In a process of its own: what was imported cannot be taken back."""
    code = textwrap.dedent(f"""
        {first}
        import mage_core
        assert {{"generate", "load"}} <= set(dir(mage_core))
        assert mage_core.generate.__qualname__ == "generate" and mage_core.load.__module__ == "mage_core.weights"
        from mage_core.generate import generate
        assert generate is mage_core.generate
        try:
            mage_core.nothing
        except AttributeError as error:
            assert "no attribute 'nothing'" in str(error)
        else:
            raise AssertionError
    """)
    done = run("-c", code, folder=machine.Path(machine.__file__).parent.parent)
    assert done.returncode == 0, done.stderr


def test_settings_are_printed_for_another_program(monkeypatch, capsys):
    monkeypatch.setenv(machine.TUNABLES, "glibc.pthread.rseq=0")
    machine.main(["--allocator"])
    printed = capsys.readouterr().out
    expected = machine.fast_allocator_environment()
    assert printed.split() == [f"{name}={value}" for name, value in expected.items()]  # one word: `env` reads it
    monkeypatch.setattr(machine, "glibc_version", lambda: None)
    machine.main(["--allocator"])
    assert capsys.readouterr().out.split() == []


def test_relaunch_never_ends_another_program(monkeypatch):
    def exec_called(*_):
        raise AssertionError("the test process would have been replaced")
    monkeypatch.setattr(os, "execve", exec_called)
    monkeypatch.delenv(machine.RELAUNCHED, raising=False)
    monkeypatch.delenv(machine.TUNABLES, raising=False)
    machine.relaunch_with_fast_allocator()  # pytest's own process
    notebook = type(sys)("__main__")  # a kernel's __main__ has no spec
    notebook.__spec__ = None
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    machine.relaunch_with_fast_allocator()


def test_bf16_is_what_torch_finds():
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this torch cannot be asked for the CPU's capabilities")
    assert machine.has_fast_bf16("cpu") == torch.cpu.get_capabilities().get("amx_bf16", False)


def test_bf16_of_other_machines(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz: fast\nflags\t\t: fpu avx512_bf16 amx_tile\n\n"
                       "processor\t: 1\nmodel name\t: Other\nflags\t\t: amx_bf16\n")
    told = machine._cpu_info(str(cpuinfo))
    assert told["model name"] == "Some CPU @ 2.00GHz: fast"
    monkeypatch.setattr(machine, "_cpu_info", lambda: told)
    assert not machine.has_fast_bf16("cpu")
    assert "Some CPU" in machine.describe() and "no fast bf16" in machine.describe()
    monkeypatch.setattr(machine, "_cpu_info", lambda: {})
    assert not machine.has_fast_bf16(torch.device("cpu")) and not machine.has_fast_bf16("meta")
    with pytest.raises(RuntimeError, match="quantum"):
        machine.has_fast_bf16("quantum")


def test_description_is_one_line_of_facts():
    line = machine.describe()
    assert line.startswith("machine: ") and "\n" not in line
    assert torch.__version__ in line and f", {torch.get_num_threads()} torch thread" in line
    assert "GPU" in line
