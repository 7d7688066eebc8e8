"""Structured fuzzers: damaged files, odd inputs and random operations, each with a known answer.

One module per fuzzer, with a class that is a `Fuzzer` named `FUZZER`. A small budget runs in CI
(test_fuzzers.py); any number of cases on request: `python -m tests.fuzz NAME --count N`.
"""
