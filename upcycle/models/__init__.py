"""Self-contained model files (torch and diffusers only); each is copied into the exports that use it."""
