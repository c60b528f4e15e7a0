"""Scripts that draw, caption, train, export and judge the demo weights in `models/z_image/demo` (see
training/README.md)."""
