"""How long things take, and on which machine: latency, throughput, loading, layer by layer."""
