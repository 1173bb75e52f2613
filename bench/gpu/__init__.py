"""Measurements on a GPU: ``bench/gpu.sh``, or ``python -m bench.gpu`` where pared is installed.

A suite is a module of this package with a function ``cases(machine) -> Iterator[Callable[[], Case]]``: each
makes the data of one case.
"""
