"""Export: from a quantized module to a folder that OpenVINO executes in INT8, and the proof that it does.

Torch and NNCF are allowed here.
"""
