"""What golden.json says is of the kernels as they are. Needs no Triton: a hash of their sources stands in it."""

import kernel_report


def test_the_golden_file_is_of_these_kernels():
    golden = kernel_report.read_golden()
    assert golden.get("sources") == kernel_report.hash_of_sources(), (
        "kernels/ changed after tests/gpu/golden.json was written: `make kernel-report` compiles all of them and "
        "writes it anew; read the difference"
    )
