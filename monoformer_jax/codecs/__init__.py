"""Between pictures and what a model generates and sees: pixels, latents or features."""
