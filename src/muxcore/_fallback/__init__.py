"""What may live here: the core in plain Python, over select, poll or kqueue: everywhere, and the oracle of the tests.

Its chapters do what those of the compiled core do, step by step and under the same names; the essays are there. It has
no generations: a batch holds owners, not descriptors, so an event is stale if its owner has lost the descriptor.
"""
