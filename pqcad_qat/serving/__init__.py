"""Running of deployed folders with OpenVINO and NumPy alone; this package can be imported without PyTorch."""
