"""Timing: latency, throughput and load time, layer by layer where needed, with the hardware they were measured on."""
