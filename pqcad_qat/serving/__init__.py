"""Running a deployed folder with OpenVINO and NumPy alone: this room can be imported where PyTorch is not installed."""
