"""What a run is worth: image quality, speed and size, and the report that shows them."""
