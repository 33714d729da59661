"""What an image is written to, and what is on it already."""
