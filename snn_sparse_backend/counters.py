"""Counts of what ran, so that a test or a benchmark can prove which path was taken."""

from __future__ import annotations

from collections import Counter

counts: Counter[str] = Counter()
"""Keys: ``neuron_steps``, ``neuron_nodes``, ``synapse_steps``, ``synapse_nodes``, ``lane_steps`` (steps of neurons
and of synapses recorded without Python), ``inhibited_steps`` (those of layers with inhibition), ``host_steps`` and,
for the products, ``weight_gradient_sparse``, ``weight_gradient_dense``, ``input_gradient_sparse``,
``input_gradient_dense``, ``forward_sparse`` and, among the latter, ``forward_deferred`` (currents of a sequence that
were never all in memory)."""


def reset_counts() -> None:
    """Sets every count to zero."""
    counts.clear()
