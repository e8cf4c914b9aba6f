"""The file by which OpenVINO Model Server serves a text-to-image folder.

Source: its page "Efficient Image Generation Serving" (docs.openvino.ai, 2026). Not here: the folder's other files
(folder_configs.py).
"""

from __future__ import annotations

_GRAPH = """\
input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"

node: {{
  name: "ImageGenExecutor"
  calculator: "ImageGenCalculator"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "IMAGE_GEN_NODE_RESOURCES:pipes"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  node_options: {{
    [type.googleapis.com / mediapipe.ImageGenCalculatorOptions]: {{
      models_path: "./"
      device: "CPU"
      default_resolution: "{width}x{height}"
{steps}    }}
  }}
}}
"""


def server_graph(size: tuple[int, int], steps: int | None) -> str:
    """Return the file's text: one node that makes images, by default of this height and width in so many steps."""
    height, width = size
    default = "" if steps is None else f"      default_num_inference_steps: {steps}\n"
    return _GRAPH.format(height=height, width=width, steps=default)
