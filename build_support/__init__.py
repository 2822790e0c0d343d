"""How `fused` is built: everything that setup.py, the tests and CI share about compiling csrc.

Read in this order: `sources` (which file is what), `toolchain` (which compiler, torch and CUDA),
`graph` (files + toolchain -> a ninja graph), `commands` (setuptools) and `backend` (PEP 517).
"""
