"""From rules to quantized layers: the plan, the Brevitas quantizers, and the conversion of a module. No training
here.
"""
