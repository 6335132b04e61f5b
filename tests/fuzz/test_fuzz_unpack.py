from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run_unpack")


def has_libfuzzer() -> bool:
    probe = ["clang", "-fsanitize=fuzzer,address", "-x", "c", "-o", "/dev/null", "-"]
    source = b"int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { return !d && n; }\n"
    try:
        return subprocess.run(probe, input=source, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not has_libfuzzer(), reason="needs clang and libclang-rt")
def test_no_archive_breaks_the_unpacker_or_leaves_its_directory() -> None:
    done = subprocess.run([RUN, "20"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "number_of_executed_units" in done.stderr
